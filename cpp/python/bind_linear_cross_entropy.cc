#include "cpu/linear_cross_entropy.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void softmax_loss(int dtype, Address logits, Address targets, int64_t rows, int64_t vocabulary, bool need_gradient,
                  Address losses) {
  require(rows >= 0 && vocabulary > 0, "softmax_loss: logits are [" + std::to_string(rows) + ", " +
                                           std::to_string(vocabulary) + "]: expected at least one column.");
  const Dtype type = checked_dtype(dtype);
  const int64_t* chosen = pointer<int64_t>(targets, rows, "targets");
  for (int64_t row = 0; row < rows; ++row) {
    require(0 <= chosen[row] && chosen[row] < vocabulary, "softmax_loss: target " + std::to_string(row) + " is " +
                                                              std::to_string(chosen[row]) + ": expected 0 to " +
                                                              std::to_string(vocabulary - 1) + ".");
  }
  cpu::softmax_loss(type, any_pointer(type, logits, rows * vocabulary, "logits"), chosen, rows, vocabulary,
                    need_gradient, pointer<float>(losses, rows, "losses"));
}

void few_logits(int dtype, Address h, Address weight, int64_t tokens, int64_t vocabulary, int64_t width,
                Address logits) {
  require(tokens >= 0 && vocabulary >= 0 && width >= 0, "few_logits: tokens, vocabulary or width is negative.");
  const Dtype type = checked_dtype(dtype);
  cpu::few_logits(type, any_pointer(type, h, tokens * width, "h"),
                  any_pointer(type, weight, vocabulary * width, "weight"), tokens, vocabulary, width,
                  any_pointer(type, logits, tokens * vocabulary, "logits"));
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  module.def("softmax_loss", &softmax_loss, py::arg("dtype"), py::arg("logits"), py::arg("targets"), py::arg("rows"),
             py::arg("vocabulary"), py::arg("need_gradient"), py::arg("losses"),
             py::call_guard<py::gil_scoped_release>(),
             "Cross entropy of each row; with need_gradient, logits become softmax - onehot in place.");
  module.def("few_logits", &few_logits, py::arg("dtype"), py::arg("h"), py::arg("weight"), py::arg("tokens"),
             py::arg("vocabulary"), py::arg("width"), py::arg("logits"), py::call_guard<py::gil_scoped_release>(),
             "logits [tokens, vocabulary] = h [tokens, width] weight^T, for a few tokens.");
}

}  // namespace qlora_native::python
