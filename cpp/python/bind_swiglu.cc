#include "cpu/swiglu.h"
#include "python/activations.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void swiglu_forward(int dtype, Address gate, Address up, int64_t numel, Address y) {
  const Dtype type = checked_dtype(dtype);
  cpu::swiglu(checked_swiglu(type, gate, up, numel, y), numel, type);
}

void swiglu_backward(int dtype, Address grad_y, Address gate, Address up, int64_t numel, Address grad_gate,
                     Address grad_up) {
  const Dtype type = checked_dtype(dtype);
  cpu::swiglu_backward(checked_swiglu_backward(type, grad_y, gate, up, numel, grad_gate, grad_up), numel, type);
}

}  // namespace

void bind_swiglu(py::module_& module) {
  module.def("swiglu", &swiglu_forward, py::arg("dtype"), py::arg("gate"), py::arg("up"), py::arg("numel"),
             py::arg("y"), py::call_guard<py::gil_scoped_release>(), "y = silu(gate) * up.");
  module.def("swiglu_backward", &swiglu_backward, py::arg("dtype"), py::arg("grad_y"), py::arg("gate"), py::arg("up"),
             py::arg("numel"), py::arg("grad_gate"), py::arg("grad_up"), py::call_guard<py::gil_scoped_release>(),
             "Gradients of swiglu to gate and up.");
}

}  // namespace qlora_native::python
