#include "cuda/lion_step.h"
#include "cuda/python/errors.h"
#include "cuda/python/optim_table.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void lion_step(Address tensors, Address chunks, int64_t num_tensors, int64_t num_chunks, Address options,
               int64_t num_groups, double grad_factor, double max_norm, Address grad_scale, Address found_inf,
               Address norm, Address grad_norm, Address skipped, Address finished, Address stream) {
  const cuda::OptimTable table = checked_table(tensors, chunks, num_tensors, num_chunks);
  const cuda::StepInputs inputs = checked_inputs(grad_factor, max_norm, grad_scale, found_inf, norm);
  const auto* rows = pointer<const double>(options, num_groups * cuda::kLionRow, "options");
  check_cuda(cuda::launch_lion_step(table, rows, inputs, checked_results(grad_norm, skipped),
                                    pointer<uint32_t>(finished, 1, "finished"), reinterpret_cast<cudaStream_t>(stream)),
             "lion_step");
}

}  // namespace

void bind_lion_step(py::module_& module) {
  module.def("lion_step", &lion_step, py::arg("tensors"), py::arg("chunks"), py::arg("num_tensors"),
             py::arg("num_chunks"), py::arg("options"), py::arg("num_groups"), py::arg("grad_factor"),
             py::arg("max_norm"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("norm"), py::arg("grad_norm"),
             py::arg("skipped"), py::arg("finished"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "One step of Lion over a table in device memory; `options` is float64 [groups, 4] there.");
}

}  // namespace qlora_native::python
