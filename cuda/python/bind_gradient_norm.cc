#include "cuda/gradient_norm.h"
#include "cuda/python/errors.h"
#include "cuda/python/optim_table.h"
#include "python/tensor_rows.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

int64_t chunks(Address rows, int64_t num_tensors, bool updates, bool second_moment, int64_t num_groups, Address chunks,
               int64_t room) {
  const std::vector<OptimTensor> tensors = checked_rows(rows, num_tensors, {updates, second_moment, num_groups});
  const int64_t count = cuda::count_chunks(tensors.data(), num_tensors);
  if (room >= count) {
    cuda::fill_chunks(tensors.data(), num_tensors, pointer<cuda::OptimChunk>(chunks, count, "chunks"));
  }
  return count;
}

void gradient_norm(Address tensors, Address chunks, int64_t num_tensors, int64_t num_chunks, Address workspace,
                   int64_t workspace_bytes, Address norm, Address stream) {
  const cuda::OptimTable table = checked_table(tensors, chunks, num_tensors, num_chunks);
  require(workspace_bytes >= cuda::gradient_norm_workspace(num_chunks), "the workspace is too small.");
  check_cuda(cuda::launch_gradient_norm(table, pointer<double>(workspace, 1, "workspace"),
                                        pointer<double>(norm, 1, "norm"), reinterpret_cast<cudaStream_t>(stream)),
             "gradient_norm");
}

}  // namespace

void bind_gradient_norm(py::module_& module) {
  module.def(
      "optim_chunks", &chunks, py::arg("rows"), py::arg("num_tensors"), py::arg("updates"), py::arg("second_moment"),
      py::arg("num_groups"), py::arg("chunks"), py::arg("room"),
      "Checks the rows of tensors, in host memory, and writes the chunks, int32 [count, 2], if there is room for "
      "them. Returns their count.");
  module.def("gradient_norm_workspace", &cuda::gradient_norm_workspace, py::arg("num_chunks"),
             "Bytes of the workspace of gradient_norm, zero before its first use.");
  module.def("gradient_norm", &gradient_norm, py::arg("tensors"), py::arg("chunks"), py::arg("num_tensors"),
             py::arg("num_chunks"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("norm"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "The norm of all gradients of a table in device memory, to a double in device memory.");
}

}  // namespace qlora_native::python
