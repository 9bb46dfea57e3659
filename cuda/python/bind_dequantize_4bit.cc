#include "cuda/dequantize_4bit.h"
#include "cuda/python/device_weight.h"
#include "cuda/python/errors.h"
#include "python/bindings.h"
#include "python/panel.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

void dequantize(int dtype, Address out, const PanelFields& rectangle, Address stream, const WeightFields& fields) {
  const WeightView weight = checked_device_weight(fields);
  const Panel panel = checked_panel(rectangle, weight.numel);
  const Dtype type = checked_dtype(dtype);
  void* target = any_pointer(type, out, panel.rows() * panel.columns(), "out");
  check_cuda(cuda::launch_dequantize_4bit(weight, panel, type, target, reinterpret_cast<cudaStream_t>(stream)),
             "dequantize_4bit");
}

}  // namespace

void bind_dequantize_4bit(py::module_& module) {
  module.def(
      "dequantize_4bit", &dequantize, py::arg("dtype"), py::arg("out"), py::arg("panel"), py::arg("stream"),
      py::arg("weight"), py::call_guard<py::gil_scoped_release>(),
      "Decode a rectangle of a weight in device memory to a dense row-major buffer on the current device, in the "
      "order of the stream.");
}

}  // namespace qlora_native::python
