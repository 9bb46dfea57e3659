// Rotary position embedding on a CUDA device: the bits of cpu/rotary.h. Pointers are device memory and trusted: the
// bindings check. Nothing here waits or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/half.h"

namespace qlora_native::cuda {

struct RotaryJob {
  const void* x;               // x[batch, head, position, 0:head_dim] at the strides below
  int64_t x_strides[3];        // elements from one batch, head, position to the next
  const void* cosine;          // [1 or batches, length, head_dim]
  const void* sine;            // [1 or batches, length, head_dim]
  int64_t angle_batch_stride;  // positions from one batch to the next: length, or 0 for angles that all share
  int64_t batches;
  int64_t heads;
  int64_t length;
  int64_t head_dim;
  bool inverse;  // the transposed rotation, which is the derivative
  void* y;
  int64_t y_strides[3];
};

// No alignment is needed beyond that of the type; with pointers, strides and half a head at multiples of 16 bytes it is
// fast.
cudaError_t launch_rotary(const RotaryJob& job, Dtype dtype, cudaStream_t stream);

}  // namespace qlora_native::cuda
