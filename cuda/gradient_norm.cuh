// One pass over all gradients: a warp sums the squares of a chunk, the last warp to finish sums the chunks.
//
// A lane is one of the running sums of core/optim.h, so lane i reads elements i, i + 32, ...: loads of a warp are
// contiguous, and enough of them are under way to hide that each sum waits for the one before.
#pragma once

#include <cstdint>

#include "core/optim.h"
#include "cuda/grid.h"
#include "cuda/tensor_list.cuh"
#include "cuda/tensor_list.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kNormWarps = 4;  // of a thread block
inline constexpr int kNormLoads = 8;  // of a lane, under way at once

template <typename T>
__device__ __forceinline__ double sum_of_squares(const T* x,  // [count]
                                                 int64_t count) {
  double sum = 0.0;
  int64_t i = threadIdx.x % 32;
  constexpr int64_t kStep = kNormLoads * kNormLanes;
  for (; i + kStep - kNormLanes < count; i += kStep) {
    float values[kNormLoads];
#pragma unroll
    for (int j = 0; j < kNormLoads; ++j) {
      values[j] = to_float(x[i + j * kNormLanes]);
    }
#pragma unroll
    for (int j = 0; j < kNormLoads; ++j) {
      const auto v = static_cast<double>(values[j]);
      sum = __fma_rn(v, v, sum);  // the product of two floats is exact in double
    }
  }
  for (; i < count; i += kNormLanes) {
    const auto v = static_cast<double>(to_float(x[i]));
    sum = __fma_rn(v, v, sum);
  }
  return sum_of_lanes(sum);
}

__device__ __forceinline__ double sum_of_chunk(const OptimTensor& tensor, int64_t index) {
  const int64_t begin = index * kNormChunk;
  const int64_t count = tensor.numel - begin < kNormChunk ? tensor.numel - begin : kNormChunk;
  return with_type(tensor.dtype, [&](auto zero) {
    return sum_of_squares(static_cast<const decltype(zero)*>(tensor.grad) + begin, count);
  });
}

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps) gradient_norm_kernel(const OptimTable table,
                                                                    double* sums,        // [num_chunks]
                                                                    uint32_t* finished,  // [1]
                                                                    double* norm) {      // [1]
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const int64_t stride = first_item(gridDim.x, kWarps);
  for (int64_t i = first_item(blockIdx.x, kWarps) + threadIdx.x / 32; i < table.num_chunks; i += stride) {
    const OptimChunk chunk = table.chunks[i];
    const double sum = sum_of_chunk(table.tensors[chunk.tensor], chunk.index);
    if (lane == 0) {
      sums[i] = sum;
    }
  }
  if (!is_last_to_finish(gridDim.x * kWarps, finished)) {
    return;
  }
  double total = 0.0;
  for (int64_t i = lane; i < table.num_chunks; i += kNormLanes) {
    total += __ldcg(sums + i);  // written by other blocks: past the first cache
  }
  total = sum_of_lanes(total);
  if (lane == 0) {
    *norm = sqrt(total);
  }
}

}  // namespace qlora_native::cuda
