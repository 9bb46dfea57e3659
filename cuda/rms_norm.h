// Root-mean-square norm over rows on a CUDA device: the bits of cpu/rms_norm.h. Pointers are device memory and trusted:
// the bindings check. Nothing here waits or allocates. No alignment is needed beyond that of the type; with pointers
// and rows at multiples of 16 bytes, and rows that fit shared memory, every byte is read once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/activations.h"
#include "core/half.h"

namespace qlora_native::cuda {

cudaError_t launch_rms_norm(const RmsNormJob& job, int64_t rows, Dtype dtype, cudaStream_t stream);
cudaError_t launch_rms_norm_backward(const RmsNormGradJob& job, int64_t rows, Dtype dtype, cudaStream_t stream);

}  // namespace qlora_native::cuda
