#include "cuda/python/all_bindings.h"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/dequantize_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

// Without a driver, or with one that is too old for the runtime built in here, there is no device to use.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string image_error() {
  const cudaError_t error = cuda::find_image();
  (void)cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorName(error);
}

}  // namespace

void bind_all(py::module_& module) {
  module.def("device_count", &device_count, py::call_guard<py::gil_scoped_release>(),
             "How many devices these kernels can run on; 0 without a driver or with one that is too old.");
  module.def("runtime_version", &runtime_version, "Version of the CUDA runtime built in, e.g. 13000 for 13.0.");
  module.def("driver_version", &driver_version, "Newest CUDA version that the driver serves, 0 without a driver.");
  module.def("image_error", &image_error, py::call_guard<py::gil_scoped_release>(),
             "Why the current device cannot run these kernels: the name of CUDA's error, or nothing if it can.");
  bind_adamw_step(module);
  bind_dequantize_4bit(module);
  bind_gradient_norm(module);
  bind_linear_4bit(module);
  bind_linear_cross_entropy(module);
  bind_lion_step(module);
  bind_paging(module);
  bind_quantize_4bit(module);
  bind_rms_norm(module);
  bind_rotary(module);
  bind_swiglu(module);
}

}  // namespace qlora_native::python
