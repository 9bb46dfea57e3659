// silu(gate) * up and its derivative on a CUDA device: the bits of cpu/swiglu.h. Pointers are device memory and
// trusted: the bindings check. Nothing here waits or allocates. No alignment is needed beyond that of the type; with
// all pointers at multiples of 16 bytes it is fast.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/activations.h"
#include "core/half.h"

namespace qlora_native::cuda {

cudaError_t launch_swiglu(const SwigluJob& job, int64_t numel, Dtype dtype, cudaStream_t stream);
cudaError_t launch_swiglu_backward(const SwigluGradJob& job, int64_t numel, Dtype dtype, cudaStream_t stream);

}  // namespace qlora_native::cuda
