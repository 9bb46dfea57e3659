// Rotations of (x[i], x[i + half]) by the angles of a position, with the arithmetic of cpu/kernels/activations-inl.h. A
// thread has a vector of each half, keeps its angles in registers, and takes head after head of the position: the
// angles are read once for kRotaryHeads heads, and not once for each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/elementwise.cuh"
#include "cuda/rotary.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kRotaryThreads = 256;
inline constexpr int kRotaryHeads = 16;  // of a thread

// a * c + b * s, each product rounded to T.
template <typename T, size_t kCount>
__device__ __forceinline__ void rotate(const float (&a)[kCount], const float (&c)[kCount], const float (&b)[kCount],
                                       const float (&s)[kCount], float (&out)[kCount]) {
  float other[kCount];
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount); ++i) {
    out[i] = a[i] * c[i];
    other[i] = b[i] * s[i];
  }
  round_to<T>(out);
  round_to<T>(other);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount); ++i) {
    out[i] += other[i];
  }
}

// Block (groups of a half, positions), grid (positions, sets of heads). kGroup: a vector, if half a head is a multiple
// of it and all lies at multiples of 16 bytes, or 1.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(const RotaryJob job) {
  const int64_t half = job.head_dim / 2;
  const int64_t at = first_item(blockIdx.x, blockDim.y) + threadIdx.y;
  const int64_t batch = at / job.length;
  const int64_t position = at % job.length;
  if (batch >= job.batches) {
    return;
  }
  const int64_t angle = (batch * job.angle_batch_stride + position) * job.head_dim;
  const int64_t first_head = first_item(blockIdx.y, kRotaryHeads);
  const int heads = at_most(job.heads - first_head, kRotaryHeads);
  for (int64_t i = threadIdx.x * kGroup; i < half; i += blockDim.x * kGroup) {
    float c1[size_t{kGroup}], c2[size_t{kGroup}], s1[size_t{kGroup}], s2[size_t{kGroup}];
    load_group<false>(static_cast<const T*>(job.cosine) + angle + i, c1);
    load_group<false>(static_cast<const T*>(job.cosine) + angle + half + i, c2);
    load_group<false>(static_cast<const T*>(job.sine) + angle + i, s1);
    load_group<false>(static_cast<const T*>(job.sine) + angle + half + i, s2);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      // The one sine that counts negative: -(b s) and b (-s) are the same bits.
      const float of_second = job.inverse ? s2[j] : -s1[j];
      s2[j] = job.inverse ? -s1[j] : s2[j];
      s1[j] = of_second;
    }
    const T* x = static_cast<const T*>(job.x) + batch * job.x_strides[0] + first_head * job.x_strides[1] +
                 position * job.x_strides[2] + i;
    T* y = static_cast<T*>(job.y) + batch * job.y_strides[0] + first_head * job.y_strides[1] +
           position * job.y_strides[2] + i;
#pragma unroll 2
    for (int head = 0; head < heads; ++head) {
      float a[size_t{kGroup}], b[size_t{kGroup}], out[size_t{kGroup}];
      load_group<true>(x + head * job.x_strides[1], a);
      load_group<true>(x + head * job.x_strides[1] + half, b);
      rotate<T>(a, c1, b, s1, out);
      store_group(y + head * job.y_strides[1], out);
      rotate<T>(b, c2, a, s2, out);
      store_group(y + head * job.y_strides[1] + half, out);
    }
  }
}

}  // namespace qlora_native::cuda
