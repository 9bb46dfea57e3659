// silu(gate) * up and its derivative on a CUDA device: the bits of cpu/swiglu.h. Pointers are device memory and
// trusted: the bindings check. Nothing here waits or allocates. No alignment is needed beyond that of the type; with
// all pointers at multiples of 16 bytes it is fast.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/half.h"

namespace qlora_native::cuda {

cudaError_t launch_swiglu(Dtype dtype,
                          const void* gate,  // [numel]
                          const void* up,    // [numel]
                          int64_t numel,
                          void* y,  // [numel]
                          cudaStream_t stream);

cudaError_t launch_swiglu_backward(Dtype dtype,
                                   const void* grad_y,  // [numel]
                                   const void* gate,    // [numel]
                                   const void* up,      // [numel]
                                   int64_t numel,
                                   void* grad_gate,  // [numel]
                                   void* grad_up,    // [numel]
                                   cudaStream_t stream);

}  // namespace qlora_native::cuda
