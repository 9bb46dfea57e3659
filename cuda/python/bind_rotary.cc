#include <pybind11/stl.h>

#include "cuda/python/errors.h"
#include "cuda/rotary.h"
#include "python/activations.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void rotate(int dtype, Address x, const RotaryStrides& x_strides, Address cosine, Address sine, int64_t angle_batches,
            const RotaryShape& shape, bool inverse, Address y, const RotaryStrides& y_strides, Address stream) {
  const Dtype type = checked_dtype(dtype);
  check_cuda(
      cuda::launch_rotary(checked_rotary(type, x, x_strides, cosine, sine, angle_batches, shape, inverse, y, y_strides),
                          type, reinterpret_cast<cudaStream_t>(stream)),
      "rotary");
}

}  // namespace

void bind_rotary(py::module_& module) {
  module.def("rotary", &rotate, py::arg("dtype"), py::arg("x"), py::arg("x_strides"), py::arg("cos"), py::arg("sin"),
             py::arg("angle_batches"), py::arg("shape"), py::arg("inverse"), py::arg("y"), py::arg("y_strides"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "Rotates the halves of each head of x in device memory; inverse is the transpose.");
}

}  // namespace qlora_native::python
