// Adds up the parts of a split reduction, in their order, so that the same plan always gives the same bits.
#pragma once

#include <cstdint>

#include "cuda/linear_4bit_decode.cuh"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kReduceThreads = 256;

// A thread makes eight neighbors of y.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    linear_4bit_reduce_kernel(const float* __restrict__ partial,  // [splits, m, pitch], pitch a multiple of 8
                              const T* __restrict__ bias,         // [columns] or null
                              T* __restrict__ y,                  // [m, columns]
                              int64_t m, int64_t columns, int64_t pitch, int splits) {
  const int64_t units = (columns + 7) / 8;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kReduceThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x; i < m * units; i += stride) {
    const int64_t row = i / units;
    const int64_t column = i % units * 8;
    float sums[8] = {};
#pragma unroll 2
    for (int split = 0; split < splits; ++split) {
      const float4* part = reinterpret_cast<const float4*>(partial + (split * m + row) * pitch + column);
      const float4 left = part[0];
      const float4 right = part[1];
      const float parts[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[j] += parts[j];
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums[j] += bias != nullptr && column + j < columns ? widened(bias[column + j]) : 0.0f;
    }
    store_eight(y, row, column, m, columns,
                make_uint4(wp::pack_word<T>(sums), wp::pack_word<T>(sums + 2), wp::pack_word<T>(sums + 4),
                           wp::pack_word<T>(sums + 6)));
  }
}

}  // namespace qlora_native::cuda
