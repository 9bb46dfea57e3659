#include "cuda/python/errors.h"
#include "cuda/swiglu.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void forward(int dtype, Address gate, Address up, int64_t numel, Address y, Address stream) {
  const Dtype type = checked_dtype(dtype);
  require(numel >= 0, "numel is negative.");
  check_cuda(cuda::launch_swiglu(type, any_pointer(type, gate, numel, "gate"), any_pointer(type, up, numel, "up"),
                                 numel, any_pointer(type, y, numel, "y"), reinterpret_cast<cudaStream_t>(stream)),
             "swiglu");
}

void backward(int dtype, Address grad_y, Address gate, Address up, int64_t numel, Address grad_gate, Address grad_up,
              Address stream) {
  const Dtype type = checked_dtype(dtype);
  require(numel >= 0, "numel is negative.");
  check_cuda(cuda::launch_swiglu_backward(
                 type, any_pointer(type, grad_y, numel, "grad_y"), any_pointer(type, gate, numel, "gate"),
                 any_pointer(type, up, numel, "up"), numel, any_pointer(type, grad_gate, numel, "grad_gate"),
                 any_pointer(type, grad_up, numel, "grad_up"), reinterpret_cast<cudaStream_t>(stream)),
             "swiglu_backward");
}

}  // namespace

void bind_swiglu(py::module_& module) {
  module.def("swiglu", &forward, py::arg("dtype"), py::arg("gate"), py::arg("up"), py::arg("numel"), py::arg("y"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>(), "y = silu(gate) * up in device memory.");
  module.def("swiglu_backward", &backward, py::arg("dtype"), py::arg("grad_y"), py::arg("gate"), py::arg("up"),
             py::arg("numel"), py::arg("grad_gate"), py::arg("grad_up"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>(), "Gradients of swiglu.");
}

}  // namespace qlora_native::python
