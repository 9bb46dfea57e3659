#include "cuda/linear_cross_entropy.h"
#include "cuda/python/errors.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void softmax_loss(int dtype, Address logits, Address targets, int64_t ignore_index, int64_t rows, int64_t vocabulary,
                  bool need_gradient, Address losses, Address stream) {
  const Dtype type = checked_dtype(dtype);
  require(rows >= 0 && vocabulary > 0, "rows or vocabulary is out of range.");
  check_cuda(cuda::launch_softmax_loss(type, any_pointer(type, logits, rows * vocabulary, "logits"),
                                       pointer<const int64_t>(targets, rows, "targets"), ignore_index, rows, vocabulary,
                                       need_gradient, pointer<float>(losses, rows, "losses"),
                                       reinterpret_cast<cudaStream_t>(stream)),
             "softmax_loss");
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  module.def("softmax_loss", &softmax_loss, py::arg("dtype"), py::arg("logits"), py::arg("targets"),
             py::arg("ignore_index"), py::arg("rows"), py::arg("vocabulary"), py::arg("need_gradient"),
             py::arg("losses"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "The loss of each row of logits in device memory, which become their own gradient if that is needed.");
}

}  // namespace qlora_native::python
