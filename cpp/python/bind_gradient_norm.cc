#include "cpu/gradient_norm.h"
#include "python/tensor_rows.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

double gradient_norm(Address rows, int64_t num_tensors) {
  const std::vector<OptimTensor> tensors = checked_rows(rows, num_tensors, {false, false, 0});
  const py::gil_scoped_release release;
  return cpu::gradient_norm(tensors.data(), num_tensors);
}

}  // namespace

void bind_gradient_norm(py::module_& module) {
  module.def("gradient_norm", &gradient_norm, py::arg("rows"), py::arg("num_tensors"),
             "Euclidean norm of all grads of a table as adamw_step's; only grad, numel and dtype are read.");
}

}  // namespace qlora_native::python
