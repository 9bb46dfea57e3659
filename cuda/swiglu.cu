#include "cuda/elementwise.cuh"
#include "cuda/swiglu.cuh"
#include "cuda/swiglu.h"

namespace qlora_native::cuda {

cudaError_t launch_swiglu(Dtype dtype, const void* gate, const void* up, int64_t numel, void* y, cudaStream_t stream) {
  if (numel == 0) {
    return cudaSuccess;
  }
  return launch_for(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_elementwise<T, 2, 1>({static_cast<const T*>(gate), static_cast<const T*>(up)}, {static_cast<T*>(y)},
                                       numel, Swiglu<T>{}, stream);
  });
}

cudaError_t launch_swiglu_backward(Dtype dtype, const void* grad_y, const void* gate, const void* up, int64_t numel,
                                   void* grad_gate, void* grad_up, cudaStream_t stream) {
  if (numel == 0) {
    return cudaSuccess;
  }
  return launch_for(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_elementwise<T, 3, 2>(
        {static_cast<const T*>(grad_y), static_cast<const T*>(gate), static_cast<const T*>(up)},
        {static_cast<T*>(grad_gate), static_cast<T*>(grad_up)}, numel, SwigluGrad<T>{}, stream);
  });
}

}  // namespace qlora_native::cuda
