#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/linear_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

// Runs the product if `scratch` is given, and returns the bytes of scratch that it takes.
int64_t run(const cpu::GemmCall& call, Address scratch, int64_t scratch_bytes) {
  const int64_t needed = cpu::linear_4bit_scratch_bytes(call);
  if (holds(scratch, scratch_bytes, needed)) {
    cpu::linear_4bit(call, reinterpret_cast<unsigned char*>(scratch));
    return 0;
  }
  return needed;
}

// A weight that was checked once. Its memory stays the caller's, who keeps it in place.
struct Matrix {
  WeightView view;  // [n, k]
  int64_t n;
  int64_t k;
};

constexpr const char* kMatrix = "qlora_native.matrix";

py::capsule matrix(int64_t n, int64_t k, const WeightFields& weight) {
  const WeightView view = checked_weight(weight);
  check_shape(n, k, view.numel);
  auto made = std::make_unique<Matrix>(Matrix{view, n, k});
  return py::capsule(made.release(), kMatrix,
                     [](PyObject* object) { delete static_cast<Matrix*>(PyCapsule_GetPointer(object, kMatrix)); });
}

int64_t matrix_forward(const py::capsule& matrix, int dtype, Address x, Address bias, Address y, int64_t m,
                       Address scratch, int64_t scratch_bytes, Address down, Address up, float up_scale, Address low,
                       int64_t r) {
  require(std::strcmp(matrix.name() == nullptr ? "" : matrix.name(), kMatrix) == 0, "expected what matrix() returned.");
  const Matrix& self = *matrix.get_pointer<Matrix>();
  const py::gil_scoped_release release;
  cpu::GemmCall call{};
  checked_size(m, "m");
  checked_size(r, "r");
  cpu::GemmJob& job = call.job;
  job.weight = self.view;
  job.dtype = checked_dtype(dtype);
  job.forward = true;
  job.x = any_pointer(job.dtype, x, product_of({m, self.k}), "x");
  job.bias = bias == 0 ? nullptr : any_pointer(job.dtype, bias, self.n, "bias");
  job.y = any_pointer(job.dtype, y, product_of({m, self.n}), "y");
  job.m = m;
  job.n = self.n;
  job.k = self.k;
  job.r = r;
  if (r > 0) {
    require(m <= cpu::few_rows(job.dtype), "an adapter as it is stored is for few_rows(dtype) rows at most.");
    call.as_stored = true;
    call.up_scale = up_scale;
    job.down = pointer<float>(down, product_of({r, self.k}), "down");
    job.made_low = any_pointer(job.dtype, low, product_of({m, r}), "low");
    job.low = job.made_low;
    job.up = pointer<float>(up, product_of({self.n, r}), "up");
  }
  return run(call, scratch, scratch_bytes);
}

int64_t linear(bool forward, int dtype, Address x, Address bias, Address down, float down_scale, Address low,
               Address up, int64_t r, Address y, int64_t m, int64_t n, int64_t k, Address scratch,
               int64_t scratch_bytes, const WeightFields& weight) {
  cpu::GemmCall call{};
  cpu::GemmJob& job = call.job;
  job.dtype = checked_dtype(dtype);
  job.forward = forward;
  checked_size(m, "m");
  checked_size(r, "r");
  job.weight = checked_weight(weight);
  check_shape(n, k, job.weight.numel);
  require(r == 0 || m == 0 || n == 0 || k == 0 || (low != 0 && up != 0),
          "an adapter of rank r > 0 needs both factors.");
  job.m = m;
  job.n = n;
  job.k = k;
  job.r = r;
  job.x = any_pointer(job.dtype, x, product_of({m, job.depth()}), "x");
  job.bias = bias == 0 ? nullptr : any_pointer(job.dtype, bias, n, "bias");
  job.low = low == 0 ? nullptr : any_pointer(job.dtype, low, product_of({m, r}), "low");
  job.up = up == 0 ? nullptr : any_pointer(job.dtype, up, product_of({job.width(), r}), "up");
  job.y = any_pointer(job.dtype, y, product_of({m, job.width()}), "y");
  job.down = down == 0 ? nullptr : any_pointer(job.dtype, down, product_of({job.depth(), r}), "down");
  job.down_scale = down_scale;
  job.made_low = down == 0 ? nullptr : const_cast<void*>(job.low);
  return run(call, scratch, scratch_bytes);
}

int64_t dense_linear(bool forward, int dtype, Address x, Address weight, Address bias, float scale, Address y,
                     int64_t m, int64_t n, int64_t k, Address scratch, int64_t scratch_bytes) {
  checked_size(m, "m");
  checked_size(n, "n");
  checked_size(k, "k");
  cpu::GemmCall call{};
  cpu::GemmJob& job = call.job;
  job.dtype = checked_dtype(dtype);
  job.forward = forward;
  job.m = m;
  job.n = n;
  job.k = k;
  job.x = any_pointer(job.dtype, x, product_of({m, job.depth()}), "x");
  job.dense = any_pointer(job.dtype, weight, product_of({n, k}), "weight");
  job.bias = bias == 0 ? nullptr : any_pointer(job.dtype, bias, n, "bias");
  job.scale = scale;
  job.y = any_pointer(job.dtype, y, product_of({m, job.width()}), "y");
  return run(call, scratch, scratch_bytes);
}

int64_t linear_scratch_bytes(int dtype, int64_t m, int64_t n, int64_t k) {
  int64_t most = 0;
  for (const bool forward : {true, false}) {
    cpu::GemmCall call{};
    call.job.dtype = checked_dtype(dtype);
    call.job.forward = forward;
    call.job.m = checked_size(m, "m");
    call.job.n = checked_size(n, "n");
    call.job.k = checked_size(k, "k");
    most = std::max(most, cpu::linear_4bit_scratch_bytes(call));
  }
  return most;
}

int64_t outer(int dtype, Address left, Address right, int64_t m, int64_t r, int64_t width, float scale, Address out,
              Address scratch, int64_t scratch_bytes) {
  checked_size(m, "m");
  checked_size(r, "r");
  checked_size(width, "width");
  const Dtype type = checked_dtype(dtype);
  const void* from_left = any_pointer(type, left, product_of({m, r}), "left");
  const void* from_right = any_pointer(type, right, product_of({m, width}), "right");
  auto* result = pointer<float>(out, product_of({r, width}), "out");
  const int64_t needed = cpu::outer_scratch_bytes(type, m, r, width);
  if (holds(scratch, scratch_bytes, needed)) {
    cpu::outer(type, from_left, from_right, m, r, width, scale, result, reinterpret_cast<unsigned char*>(scratch));
    return 0;
  }
  return needed;
}

}  // namespace

void bind_linear_4bit(py::module_& module) {
  module.def(
      "few_rows", [](int dtype) { return cpu::few_rows(checked_dtype(dtype)); }, py::arg("dtype"),
      "Rows of x up to which matrix_forward takes an adapter, for this dtype on this machine.");
  module.def("linear_4bit", &linear, py::arg("forward"), py::arg("dtype"), py::arg("x"), py::arg("bias"),
             py::arg("down"), py::arg("down_scale"), py::arg("low"), py::arg("up"), py::arg("r"), py::arg("y"),
             py::arg("m"), py::arg("n"), py::arg("k"), py::arg("scratch"), py::arg("scratch_bytes"), py::arg("weight"),
             py::call_guard<py::gil_scoped_release>(),
             "y = x W^T + bias + low up^T for a weight [n, k], or y = x W + low up. With `down`, low is computed too. "
             "Returns 0, or the bytes of 64-byte aligned scratch that it needs before it runs.");
  module.def("matrix", &matrix, py::arg("n"), py::arg("k"), py::arg("weight"),
             "A weight [n, k], checked once, whose memory the caller keeps in place.");
  module.def("matrix_forward", &matrix_forward, py::arg("matrix"), py::arg("dtype"), py::arg("x"), py::arg("bias"),
             py::arg("y"), py::arg("m"), py::arg("scratch"), py::arg("scratch_bytes"), py::arg("down") = 0,
             py::arg("up") = 0, py::arg("up_scale") = 0.0f, py::arg("low") = 0, py::arg("r") = 0,
             "linear_4bit with what matrix() returned, forward. An adapter's down [r, k] and up [n, r] are fp32: "
             "low = x down^T is written, and up_scale low up^T added.");
  module.def(
      "dense_linear", &dense_linear, py::arg("forward"), py::arg("dtype"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("scale"), py::arg("y"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("scratch"),
      py::arg("scratch_bytes"), py::call_guard<py::gil_scoped_release>(),
      "y = scale * x W^T + bias for a dense weight [n, k] of x's dtype, or y = scale * x W. Returns as linear_4bit "
      "does.");
  module.def("linear_scratch_bytes", &linear_scratch_bytes, py::arg("dtype"), py::arg("m"), py::arg("n"), py::arg("k"),
             "Bytes of scratch that a product with a weight [n, k] takes, or its input gradient, with no adapter.");
  module.def(
      "outer", &outer, py::arg("dtype"), py::arg("left"), py::arg("right"), py::arg("m"), py::arg("r"),
      py::arg("width"), py::arg("scale"), py::arg("out"), py::arg("scratch"), py::arg("scratch_bytes"),
      py::call_guard<py::gil_scoped_release>(),
      "out [r, width] = scale * left^T right in fp32, for left [m, r] and right [m, width] of one dtype. Returns "
      "as linear_4bit does.");
}

}  // namespace qlora_native::python
