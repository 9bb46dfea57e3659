#include "cpu/rms_norm.h"
#include "python/activations.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void rms_norm_forward(int dtype, Address x, Address weight, float eps, int64_t rows, int64_t width, Address y,
                      Address rstd) {
  const Dtype type = checked_dtype(dtype);
  cpu::rms_norm(checked_rms_norm(type, x, weight, eps, rows, width, y, rstd), rows, type);
}

void rms_norm_backward(int dtype, Address grad_y, Address x, Address weight, Address rstd, int64_t rows, int64_t width,
                       Address grad_x) {
  const Dtype type = checked_dtype(dtype);
  cpu::rms_norm_backward(checked_rms_norm_backward(type, grad_y, x, weight, rstd, rows, width, grad_x), rows, type);
}

}  // namespace

void bind_rms_norm(py::module_& module) {
  module.def("rms_norm", &rms_norm_forward, py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("eps"),
             py::arg("rows"), py::arg("width"), py::arg("y"), py::arg("rstd"), py::call_guard<py::gil_scoped_release>(),
             "y = weight * x / rms(x) over rows of x, and rstd = 1 / rms(x).");
  module.def("rms_norm_backward", &rms_norm_backward, py::arg("dtype"), py::arg("grad_y"), py::arg("x"),
             py::arg("weight"), py::arg("rstd"), py::arg("rows"), py::arg("width"), py::arg("grad_x"),
             py::call_guard<py::gil_scoped_release>(), "Gradient of rms_norm to x.");
}

}  // namespace qlora_native::python
