// Error codes of the CUDA runtime to sentences.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace qlora_native::python {

// What the user can do about the errors that a launch meets in practice.
inline std::string remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return "This build has kernels for the architectures " QLORA_NATIVE_CUDA_ARCHS_BUILT
             ": reinstall with QLORA_NATIVE_CUDA_ARCHS set to the compute capability of this device.";
    case cudaErrorInsufficientDriver:
      return "Update the NVIDIA driver, or reinstall with a CUDA toolkit that this driver serves.";
    case cudaErrorNoDevice:
      return "Move the tensors to the CPU, or make a device visible (see CUDA_VISIBLE_DEVICES).";
    default:
      return "An earlier kernel of this process may have caused it: run again with CUDA_LAUNCH_BLOCKING=1 to find out.";
  }
}

// Throws std::runtime_error (RuntimeError in Python) unless the call of `op` succeeded.
inline void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA failed with " + cudaGetErrorName(error) + " (" +
                             cudaGetErrorString(error) + "). " + remedy(error));
  }
}

}  // namespace qlora_native::python
