// Rotary position embedding on a CUDA device: the bits of cpu/rotary.h. Pointers are device memory and trusted: the
// bindings check. Nothing here waits or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "core/activations.h"
#include "core/half.h"

namespace qlora_native::cuda {

// No alignment is needed beyond that of the type; with pointers, strides and half a head at multiples of 16 bytes it is
// fast.
cudaError_t launch_rotary(const RotaryJob& job, Dtype dtype, cudaStream_t stream);

}  // namespace qlora_native::cuda
