#include "cuda/dequantize_4bit.h"
#include "cuda/python/device_weight.h"
#include "cuda/python/errors.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void dequantize(int dtype, Address out, Address stream, const WeightFields& fields) {
  const WeightView weight = checked_device_weight(fields);
  const int64_t numel = weight.numel;
  const Dtype type = checked_dtype(dtype);
  void* target = type == Dtype::kFloat32 ? static_cast<void*>(pointer<float>(out, numel, "out"))
                                         : pointer<uint16_t>(out, numel, "out");
  check_cuda(cuda::launch_dequantize_4bit(weight, type, target, reinterpret_cast<cudaStream_t>(stream)),
             "dequantize_4bit");
}

}  // namespace

void bind_dequantize_4bit(py::module_& module) {
  module.def("dequantize_4bit", &dequantize, py::arg("dtype"), py::arg("out"), py::arg("stream"), py::arg("weight"),
             py::call_guard<py::gil_scoped_release>(),
             "Decode a weight in device memory to a dense buffer on the current device, in the order of the stream.");
}

}  // namespace qlora_native::python
