#include <pybind11/stl.h>

#include "cpu/rotary.h"
#include "python/activations.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void rotate(int dtype, Address x, const RotaryStrides& x_strides, Address cosine, Address sine, int64_t angle_batches,
            const RotaryShape& shape, bool inverse, Address y, const RotaryStrides& y_strides) {
  const Dtype type = checked_dtype(dtype);
  cpu::rotary(checked_rotary(type, x, x_strides, cosine, sine, angle_batches, shape, inverse, y, y_strides), type);
}

}  // namespace

void bind_rotary(py::module_& module) {
  module.def("rotary", &rotate, py::arg("dtype"), py::arg("x"), py::arg("x_strides"), py::arg("cos"), py::arg("sin"),
             py::arg("angle_batches"), py::arg("shape"), py::arg("inverse"), py::arg("y"), py::arg("y_strides"),
             py::call_guard<py::gil_scoped_release>(),
             "Rotates the halves of each head of x by the angles of its position; inverse is the transpose.");
}

}  // namespace qlora_native::python
