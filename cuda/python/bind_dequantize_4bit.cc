#include "cuda/dequantize_4bit.h"
#include "cuda/python/errors.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void dequantize(int dtype, Address out, Address stream, Address packed, Address absmax, Address absmax_codes,
                Address nested_absmax, Address nested_offset, Address nested_code, Address levels, int quant_type,
                int64_t numel, int64_t block_size) {
  // The built-in tables that 0 stands for lie in host memory.
  require(levels != 0, "levels is a null pointer: expected the address of 16 floats in device memory.");
  require(absmax_codes == 0 || nested_code != 0,
          "nested_code is a null pointer: expected the address of 256 floats in device memory.");
  const WeightView weight = checked_weight(packed, absmax, absmax_codes, nested_absmax, nested_offset, nested_code,
                                           levels, quant_type, numel, block_size);
  const Dtype type = checked_dtype(dtype);
  void* target = type == Dtype::kFloat32 ? static_cast<void*>(pointer<float>(out, numel, "out"))
                                         : pointer<uint16_t>(out, numel, "out");
  check_cuda(cuda::launch_dequantize_4bit(weight, type, target, reinterpret_cast<cudaStream_t>(stream)),
             "dequantize_4bit");
}

}  // namespace

void bind_dequantize_4bit(py::module_& module) {
  module.def("dequantize_4bit", &dequantize, py::arg("dtype"), py::arg("out"), py::arg("stream"), py::arg("packed"),
             py::arg("absmax"), py::arg("absmax_codes"), py::arg("nested_absmax"), py::arg("nested_offset"),
             py::arg("nested_code"), py::arg("levels"), py::arg("quant_type"), py::arg("numel"), py::arg("block_size"),
             py::call_guard<py::gil_scoped_release>(),
             "Decode a weight in device memory to a dense buffer on the current device, in the order of the stream.");
}

}  // namespace qlora_native::python
