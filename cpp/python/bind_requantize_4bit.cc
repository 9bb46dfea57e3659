#include "cpu/requantize_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void requantize(Address a, Address b, int64_t r, float scale, int64_t n, int64_t k, Address packed,
                const WeightFields& fields) {
  const WeightView weight = checked_weight(fields);
  checked_size(r, "r");
  require(product_of({checked_size(n, "n"), checked_size(k, "k")}) == weight.numel,
          "the weight has " + std::to_string(weight.numel) + " elements: expected n * k.");
  const BlockFormat& format = kBlockFormats[static_cast<int>(weight.type)];
  require(!is_gguf(weight.type) || k % format.elements == 0, "rows have " + std::to_string(k) +
                                                                 " elements: expected whole blocks of " +
                                                                 std::to_string(format.elements) + ".");
  cpu::requantize_4bit({weight, n, k, pointer<const float>(a, product_of({r, k}), "a"),
                        pointer<const float>(b, product_of({n, r}), "b"), r, scale,
                        pointer<uint8_t>(packed, packed_bytes(weight.type, weight.numel), "packed")});
}

}  // namespace

void bind_requantize_4bit(py::module_& module) {
  module.def("requantize_4bit", &requantize, py::arg("a"), py::arg("b"), py::arg("r"), py::arg("scale"), py::arg("n"),
             py::arg("k"), py::arg("packed"), py::arg("weight"), py::call_guard<py::gil_scoped_release>(),
             "The codes nearest to W + scale * B A under the scales that W has.");
}

}  // namespace qlora_native::python
