#include "cpu/linear_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void linear(int dtype, Address x, Address bias, Address y, int64_t m, int64_t n, int64_t k, Address packed,
            Address absmax, Address absmax_codes, Address nested_absmax, Address nested_offset, Address nested_code,
            Address levels, int quant_type, int64_t numel, int64_t block_size) {
  const WeightView weight = checked_weight(packed, absmax, absmax_codes, nested_absmax, nested_offset, nested_code,
                                           levels, quant_type, numel, block_size);
  require(m >= 0 && m <= cpu::linear_4bit_max_tokens(),
          "m is " + std::to_string(m) + ": expected 0 to " + std::to_string(cpu::linear_4bit_max_tokens()) + ".");
  require(n >= 0 && k >= 0 && (n == 0 ? numel == 0 : numel % n == 0 && numel / n == k),
          "a weight of " + std::to_string(numel) + " elements is not [" + std::to_string(n) + ", " + std::to_string(k) +
              "].");
  const Dtype type = checked_dtype(dtype);
  const auto operand = [type](Address address, int64_t count, const char* what) {
    return type == Dtype::kFloat32 ? static_cast<void*>(pointer<float>(address, count, what))
                                   : pointer<uint16_t>(address, count, what);
  };
  cpu::linear_4bit(weight, type, operand(x, m * k, "x"), bias == 0 ? nullptr : operand(bias, n, "bias"), m, n, k,
                   operand(y, m * n, "y"));
}

}  // namespace

void bind_linear_4bit(py::module_& module) {
  module.attr("linear_4bit_max_tokens") = cpu::linear_4bit_max_tokens();
  module.def("linear_4bit", &linear, py::arg("dtype"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("m"),
             py::arg("n"), py::arg("k"), py::arg("packed"), py::arg("absmax"), py::arg("absmax_codes"),
             py::arg("nested_absmax"), py::arg("nested_offset"), py::arg("nested_code"), py::arg("levels"),
             py::arg("quant_type"), py::arg("numel"), py::arg("block_size"), py::call_guard<py::gil_scoped_release>(),
             "x [m, k] times the transpose of a weight [n, k], plus a bias [n] or 0, for small m.");
}

}  // namespace qlora_native::python
