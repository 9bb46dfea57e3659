#include <vector>

#include "cpu/gptq_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

const int64_t* permutation(Address order, int64_t k) {
  const auto* columns = pointer<const int64_t>(order, k, "order");
  std::vector<bool> seen(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    require(columns[i] >= 0 && columns[i] < k && !seen[static_cast<size_t>(columns[i])],
            "order is no permutation of the columns.");
    seen[static_cast<size_t>(columns[i])] = true;
  }
  return columns;
}

void gptq(Address x, int dtype, int64_t n, int64_t k, int64_t block_size, int quant_type, Address factor, Address order,
          Address scales, Address packed) {
  check_block_size(block_size);
  checked_size(n, "n");
  checked_size(k, "k");
  const Dtype type = checked_dtype(dtype);
  const int64_t numel = product_of({n, k});
  cpu::gptq_4bit(any_pointer(type, x, numel, "x"), type, n, k, block_size, checked_quant_type(quant_type),
                 pointer<const float>(factor, product_of({k, k}), "factor"), permutation(order, k),
                 pointer<const float>(scales, num_blocks(numel, block_size), "scales"),
                 pointer<uint8_t>(packed, packed_bytes(numel), "packed"));
}

}  // namespace

void bind_gptq_4bit(py::module_& module) {
  module.def("gptq_4bit", &gptq, py::arg("x"), py::arg("dtype"), py::arg("n"), py::arg("k"), py::arg("block_size"),
             py::arg("quant_type"), py::arg("factor"), py::arg("order"), py::arg("scales"), py::arg("packed"),
             py::call_guard<py::gil_scoped_release>(),
             "Codes of a matrix under given scales, each column's error made good by the later columns.");
}

}  // namespace qlora_native::python
