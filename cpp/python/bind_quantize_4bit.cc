#include "cpu/quantize_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

int64_t quantize(Address x, int dtype, int64_t numel, int64_t block_size, int quant_type, Address packed,
                 Address absmax) {
  check_block_size(block_size);
  checked_size(numel, "numel");
  const Dtype type = checked_dtype(dtype);
  const void* input = type == Dtype::kFloat32 ? static_cast<const void*>(pointer<const float>(x, numel, "x"))
                                              : pointer<const uint16_t>(x, numel, "x");
  return cpu::quantize_4bit(input, type, numel, block_size, checked_quant_type(quant_type),
                            pointer<uint8_t>(packed, packed_bytes(numel), "packed"),
                            pointer<float>(absmax, num_blocks(numel, block_size), "absmax"));
}

void quantize_scales(Address absmax, int64_t blocks, Address codes, Address nested_absmax, Address nested_offset) {
  checked_size(blocks, "blocks");
  cpu::quantize_scales(pointer<const float>(absmax, blocks, "absmax"), blocks, pointer<uint8_t>(codes, blocks, "codes"),
                       pointer<float>(nested_absmax, num_nested_blocks(blocks), "nested_absmax"),
                       pointer<float>(nested_offset, 1, "nested_offset"));
}

}  // namespace

void bind_quantize_4bit(py::module_& module) {
  module.def("quantize_4bit", &quantize, py::arg("x"), py::arg("dtype"), py::arg("numel"), py::arg("block_size"),
             py::arg("quant_type"), py::arg("packed"), py::arg("absmax"), py::call_guard<py::gil_scoped_release>(),
             "Quantize numel elements at address x; returns the index of a non-finite one, or -1.");
  module.def("quantize_scales", &quantize_scales, py::arg("absmax"), py::arg("blocks"), py::arg("codes"),
             py::arg("nested_absmax"), py::arg("nested_offset"), py::call_guard<py::gil_scoped_release>(),
             "Double quantization of fp32 scales to 8-bit codes in blocks of 256.");
}

}  // namespace qlora_native::python
