#include "cpu/search_scales_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void search(Address x, int dtype, int64_t numel, int64_t k, int64_t block_size, int quant_type, Address moment,
            Address table, int64_t count, int64_t group, Address multiplier, float offset, float low, float high,
            Address initial, Address packed, Address chosen) {
  check_block_size(block_size);
  checked_size(numel, "numel");
  checked_size(k, "k");
  checked_size(group, "group");
  require(k >= 1, "numel and k are " + std::to_string(numel) + " and " + std::to_string(k) +
                      ": expected 0 or more, and 1 or more.");
  require(count >= 1 && count <= 256 && group >= 1, "count and group are " + std::to_string(count) + " and " +
                                                        std::to_string(group) + ": expected 1 to 256, and 1 or more.");
  const Dtype type = checked_dtype(dtype);
  const int64_t blocks = num_blocks(numel, block_size);
  const uint8_t* first = pointer<const uint8_t>(initial, blocks, "initial");
  for (int64_t block = 0; block < blocks; ++block) {
    require(first[block] < count, "initial is beyond the end of the table.");
  }
  cpu::search_scales_4bit(
      {any_pointer(type, x, numel, "x"), numel, k, block_size, checked_quant_type(quant_type),
       pointer<const float>(moment, k, "moment"), pointer<const float>(table, count, "table"), count, group,
       pointer<const float>(multiplier, ceil_div(blocks, group), "multiplier"), offset, low, high, first,
       pointer<uint8_t>(packed, packed_bytes(numel), "packed"), pointer<uint8_t>(chosen, blocks, "chosen")},
      type);
}

}  // namespace

void bind_search_scales_4bit(py::module_& module) {
  module.def("search_scales_4bit", &search, py::arg("x"), py::arg("dtype"), py::arg("numel"), py::arg("k"),
             py::arg("block_size"), py::arg("quant_type"), py::arg("moment"), py::arg("table"), py::arg("count"),
             py::arg("group"), py::arg("multiplier"), py::arg("offset"), py::arg("low"), py::arg("high"),
             py::arg("initial"), py::arg("packed"), py::arg("chosen"), py::call_guard<py::gil_scoped_release>(),
             "For each block the scale of the least weighted squared error, and the codes under it.");
}

}  // namespace qlora_native::python
