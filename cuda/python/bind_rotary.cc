#include <pybind11/stl.h>

#include <array>

#include "cuda/python/errors.h"
#include "cuda/rotary.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using Shape = std::array<int64_t, 4>;    // batches, heads, length, head_dim
using Strides = std::array<int64_t, 3>;  // of the first three, in elements; the last one is 1

void run(int dtype, Address x, const Strides& x_strides, Address cosine, Address sine, int64_t angle_batches,
         const Shape& shape, bool inverse, Address y, const Strides& y_strides, Address stream) {
  const auto [batches, heads, length, head_dim] = shape;
  require(batches >= 0 && heads >= 0 && length >= 0 && head_dim > 0 && head_dim % 2 == 0,
          "rotary: a head has " + std::to_string(head_dim) + " dimensions: expected an even number.");
  require(angle_batches == 1 || angle_batches == batches, "rotary: cos has " + std::to_string(angle_batches) +
                                                              " rows for " + std::to_string(batches) +
                                                              " of x: expected one for all or one for each.");
  const Dtype type = checked_dtype(dtype);
  const int64_t numel = batches * heads * length * head_dim;
  const int64_t angles = angle_batches * length * head_dim;
  const cuda::RotaryJob job{any_pointer(type, x, numel, "x"),
                            {x_strides[0], x_strides[1], x_strides[2]},
                            any_pointer(type, cosine, angles, "cos"),
                            any_pointer(type, sine, angles, "sin"),
                            angle_batches == 1 ? 0 : length,
                            batches,
                            heads,
                            length,
                            head_dim,
                            inverse,
                            any_pointer(type, y, numel, "y"),
                            {y_strides[0], y_strides[1], y_strides[2]}};
  check_cuda(cuda::launch_rotary(job, type, reinterpret_cast<cudaStream_t>(stream)), "rotary");
}

}  // namespace

void bind_rotary(py::module_& module) {
  module.def("rotary", &run, py::arg("dtype"), py::arg("x"), py::arg("x_strides"), py::arg("cos"), py::arg("sin"),
             py::arg("angle_batches"), py::arg("shape"), py::arg("inverse"), py::arg("y"), py::arg("y_strides"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "Rotates the halves of each head of x in device memory; inverse is the transpose.");
}

}  // namespace qlora_native::python
