#include "cuda/python/errors.h"
#include "cuda/quantize_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void quantize(int dtype, Address x, int64_t numel, int64_t block_size, int quant_type, Address packed, Address absmax,
              Address first_bad, Address stream) {
  const Dtype type = checked_dtype(dtype);
  check_block_size(block_size);
  require(numel >= 0, "numel is " + std::to_string(numel) + ": expected 0 or more.");
  check_cuda(cuda::launch_quantize_4bit(
                 any_pointer(type, x, numel, "x"), type, numel, block_size, checked_quant_type(quant_type),
                 pointer<uint8_t>(packed, packed_bytes(numel), "packed"),
                 pointer<float>(absmax, num_blocks(numel, block_size), "absmax"),
                 pointer<int64_t>(first_bad, 1, "first_bad"), reinterpret_cast<cudaStream_t>(stream)),
             "quantize_4bit");
}

void quantize_scales(Address absmax, int64_t blocks, Address codes, Address nested_absmax, Address nested_offset,
                     Address workspace, int64_t workspace_bytes, Address stream) {
  require(blocks >= 0, "blocks is negative.");
  require(workspace_bytes >= cuda::quantize_scales_workspace(blocks), "the workspace is too small.");
  check_cuda(cuda::launch_quantize_scales(
                 pointer<const float>(absmax, blocks, "absmax"), blocks, pointer<uint8_t>(codes, blocks, "codes"),
                 pointer<float>(nested_absmax, num_nested_blocks(blocks), "nested_absmax"),
                 pointer<float>(nested_offset, 1, "nested_offset"),
                 pointer<double>(workspace, workspace_bytes, "workspace"), reinterpret_cast<cudaStream_t>(stream)),
             "quantize_scales");
}

}  // namespace

void bind_quantize_4bit(py::module_& module) {
  module.def("quantize_4bit", &quantize, py::arg("dtype"), py::arg("x"), py::arg("numel"), py::arg("block_size"),
             py::arg("quant_type"), py::arg("packed"), py::arg("absmax"), py::arg("first_bad"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>(),
             "Codes and scales of a tensor in device memory. first_bad, int64 there, becomes -1, or the index of the "
             "first element that is not finite.");
  module.def("quantize_scales_workspace", &cuda::quantize_scales_workspace, py::arg("blocks"),
             "Bytes of the workspace of quantize_scales.");
  module.def("quantize_scales", &quantize_scales, py::arg("absmax"), py::arg("blocks"), py::arg("codes"),
             py::arg("nested_absmax"), py::arg("nested_offset"), py::arg("workspace"), py::arg("workspace_bytes"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "Double quantization of the scales of quantize_4bit.");
}

}  // namespace qlora_native::python
