#include "cpu/linear_cross_entropy.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void softmax_loss(int dtype, Address logits, Address targets, int64_t rows, int64_t vocabulary, bool need_gradient,
                  Address losses) {
  require(rows >= 0 && vocabulary > 0, "softmax_loss: logits are [" + std::to_string(rows) + ", " +
                                           std::to_string(vocabulary) + "]: expected at least one column.");
  checked_size(rows, "rows");
  const Dtype type = checked_dtype(dtype);
  const int64_t* chosen = pointer<int64_t>(targets, rows, "targets");
  for (int64_t row = 0; row < rows; ++row) {
    require(0 <= chosen[row] && chosen[row] < vocabulary, "softmax_loss: target " + std::to_string(row) + " is " +
                                                              std::to_string(chosen[row]) + ": expected 0 to " +
                                                              std::to_string(vocabulary - 1) + ".");
  }
  cpu::softmax_loss(type, any_pointer(type, logits, product_of({rows, vocabulary}), "logits"), chosen, rows, vocabulary,
                    need_gradient, pointer<float>(losses, rows, "losses"));
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  module.def("softmax_loss", &softmax_loss, py::arg("dtype"), py::arg("logits"), py::arg("targets"), py::arg("rows"),
             py::arg("vocabulary"), py::arg("need_gradient"), py::arg("losses"),
             py::call_guard<py::gil_scoped_release>(),
             "Cross entropy of each row; with need_gradient, logits become softmax - onehot in place.");
}

}  // namespace qlora_native::python
