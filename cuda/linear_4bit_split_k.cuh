// Adds up the parts of a split reduction, in their order, so that the same plan always gives the same bits.
#pragma once

#include <cstdint>

#include "cuda/linear_4bit_tile.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kReduceThreads = 256;

// A thread makes two neighbours of y.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    linear_4bit_reduce_kernel(const float* __restrict__ partial,  // [splits, m, pitch]
                              const T* __restrict__ bias,         // [columns] or null
                              T* __restrict__ y,                  // [m, columns]
                              int64_t m, int64_t columns, int64_t pitch, int splits) {
  const int64_t pairs = (columns + 1) / 2;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kReduceThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x; i < m * pairs; i += stride) {
    const int64_t row = i / pairs;
    const int64_t column = i % pairs * 2;
    float first = 0.0f;
    float second = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float2 part = *reinterpret_cast<const float2*>(partial + (split * m + row) * pitch + column);
      first += part.x;
      second += part.y;
    }
    if (bias != nullptr) {
      first += widened(bias[column]);
      second += column + 1 < columns ? widened(bias[column + 1]) : 0.0f;
    }
    store_pair(y + row * columns, column, columns, first, second);
  }
}

}  // namespace qlora_native::cuda
