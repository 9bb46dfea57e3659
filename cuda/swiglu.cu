#include "cuda/elementwise.cuh"
#include "cuda/swiglu.cuh"
#include "cuda/swiglu.h"

namespace qlora_native::cuda {

cudaError_t launch_swiglu(const SwigluJob& job, int64_t numel, Dtype dtype, cudaStream_t stream) {
  if (numel == 0) {
    return cudaSuccess;
  }
  return launch_for(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_elementwise<T, 2, 1>({static_cast<const T*>(job.gate), static_cast<const T*>(job.up)},
                                       {static_cast<T*>(job.y)}, numel, Swiglu<T>{}, stream);
  });
}

cudaError_t launch_swiglu_backward(const SwigluGradJob& job, int64_t numel, Dtype dtype, cudaStream_t stream) {
  if (numel == 0) {
    return cudaSuccess;
  }
  return launch_for(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_elementwise<T, 3, 2>(
        {static_cast<const T*>(job.grad_y), static_cast<const T*>(job.gate), static_cast<const T*>(job.up)},
        {static_cast<T*>(job.grad_gate), static_cast<T*>(job.grad_up)}, numel, SwigluGrad<T>{}, stream);
  });
}

}  // namespace qlora_native::cuda
