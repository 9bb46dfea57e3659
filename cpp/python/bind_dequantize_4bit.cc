#include "cpu/dequantize_4bit.h"
#include "python/bindings.h"
#include "python/panel.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void dequantize(int dtype, Address out, int64_t row_length, int64_t row_begin, int64_t row_end, int64_t column_begin,
                int64_t column_end, const WeightFields& fields) {
  const WeightView weight = checked_weight(fields);
  const Panel panel = checked_panel({row_length, row_begin, row_end, column_begin, column_end}, weight.numel);
  const int64_t count = panel.rows() * panel.columns();
  const Dtype type = checked_dtype(dtype);
  void* target = any_pointer(type, out, count, "out");
  if (count > 0) {
    cpu::dequantize_4bit(weight, panel, type, target);
  }
}

void decode_scales(Address absmax_codes, Address nested_absmax, Address nested_offset, Address nested_code,
                   int64_t blocks, Address scales) {
  constexpr int64_t kAnyBlock = 64;
  checked_size(blocks, "blocks");
  const WeightView weight = checked_weight({absmax_codes, 0, absmax_codes, nested_absmax, nested_offset, nested_code, 0,
                                            0, product_of({blocks, kAnyBlock}), kAnyBlock});
  cpu::decode_scales(weight, blocks, pointer<float>(scales, blocks, "scales"));
}

}  // namespace

void bind_dequantize_4bit(py::module_& module) {
  module.def("dequantize_4bit", &dequantize, py::arg("dtype"), py::arg("out"), py::arg("row_length"),
             py::arg("row_begin"), py::arg("row_end"), py::arg("column_begin"), py::arg("column_end"),
             py::arg("weight"), py::call_guard<py::gil_scoped_release>(),
             "Decode a rectangle of a weight of rows of row_length to a dense row-major buffer.");
  module.def("decode_scales", &decode_scales, py::arg("absmax_codes"), py::arg("nested_absmax"),
             py::arg("nested_offset"), py::arg("nested_code"), py::arg("blocks"), py::arg("scales"),
             py::call_guard<py::gil_scoped_release>(), "Undo double quantization: 8-bit codes to fp32 scales.");
}

}  // namespace qlora_native::python
