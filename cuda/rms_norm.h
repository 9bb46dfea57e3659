// Root-mean-square norm over rows on a CUDA device: the bits of cpu/rms_norm.h. Pointers are device memory and trusted:
// the bindings check. Nothing here waits or allocates. No alignment is needed beyond that of the type; with pointers
// and rows at multiples of 16 bytes, and rows that fit shared memory, every byte is read once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/half.h"

namespace qlora_native::cuda {

cudaError_t launch_rms_norm(Dtype dtype,
                            const void* x,       // [rows, width]
                            const void* weight,  // [width]
                            float eps, int64_t rows, int64_t width,
                            void* y,      // [rows, width]
                            float* rstd,  // [rows], 1 / sqrt(mean(x^2) + eps)
                            cudaStream_t stream);

// The gradient to x.
cudaError_t launch_rms_norm_backward(Dtype dtype,
                                     const void* grad_y,  // [rows, width]
                                     const void* x,       // [rows, width]
                                     const void* weight,  // [width]
                                     const float* rstd,   // [rows]
                                     int64_t rows, int64_t width,
                                     void* grad_x,  // [rows, width]
                                     cudaStream_t stream);

}  // namespace qlora_native::cuda
