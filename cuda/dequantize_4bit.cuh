// One pass from packed codes to values, nested scales included, bound by memory: 0.52 bytes in, 2 or 4 out per element.
//
// A thread decodes runs of 32 elements, 16 packed bytes, which never leave a block (the smallest has 32): one scale a
// run. The 16 levels stand in shared memory, one bank each, so lanes that read different levels meet different banks
// and lanes that read the same one share it. level * scale is rounded to fp32 and then to T, as on the CPU.
#pragma once

#include <cstdint>

#include "core/arithmetic.h"
#include "core/layout.h"
#include "core/weight_view.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kRun = 32;             // elements
inline constexpr int kRunBytes = kRun / 2;  // packed
inline constexpr int kVector = 16;          // bytes a load or store moves
static_assert(kRun <= kMinBlock && kRunBytes == kVector);

// Eight codes of one little-endian word, the even element in the high nibble of each byte.
template <typename T>
__device__ __forceinline__ void decode_word(uint32_t word,
                                            const float* levels,  // [16], shared
                                            float scale,
                                            T* out) {  // [8], 16-byte aligned
  float values[8];
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    values[2 * byte] = __fmul_rn(levels[word >> (8 * byte + 4) & 15], scale);
    values[2 * byte + 1] = __fmul_rn(levels[word >> (8 * byte) & 15], scale);
  }
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  constexpr int kPerVector = kVector / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < 8; i += kPerVector) {
    const float* group = values + i;
    wp::store_16(out + i, make_uint4(wp::pack_word<T>(group), wp::pack_word<T>(group + kPerWord),
                                     wp::pack_word<T>(group + 2 * kPerWord), wp::pack_word<T>(group + 3 * kPerWord)));
  }
}

template <typename T>
__device__ __forceinline__ void decode_run(uint4 packed,
                                           const float* levels,  // [16], shared
                                           float scale,
                                           T* out) {  // [32], 16-byte aligned
  decode_word(packed.x, levels, scale, out);
  decode_word(packed.y, levels, scale, out + 8);
  decode_word(packed.z, levels, scale, out + 16);
  decode_word(packed.w, levels, scale, out + 24);
}

// The last run of a weight, and every run of one whose addresses allow no vectors.
template <typename T>
__device__ __forceinline__ void decode_singly(const WeightView& weight, int64_t begin, int64_t end,
                                              const float* levels,  // [16], shared
                                              float scale,
                                              T* out) {  // [weight.numel]
  for (int64_t element = begin; element < end; ++element) {
    out[element] = from_float<T>(__fmul_rn(levels[weight.code(element)], scale));
  }
}

// kAligned: weight.packed and out lie at multiples of 16 bytes. block_shift: log2 of weight.block_size.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) dequantize_4bit_kernel(const WeightView weight, int block_shift,
                                                                   T* __restrict__ out) {  // [weight.numel]
  WP_SHARED(float, levels, 16);
  if (threadIdx.x < 16) {
    levels[threadIdx.x] = weight.levels[threadIdx.x];
  }
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kRun;
  int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRun;
  for (; begin < weight.numel; begin += stride) {
    const float scale = weight.scale(begin >> block_shift);
    if (kAligned && begin + kRun <= weight.numel) {
      decode_run(wp::load_16_streaming(weight.packed + begin / 2), levels, scale, out + begin);
    } else {
      const int64_t end = begin + kRun < weight.numel ? begin + kRun : weight.numel;
      decode_singly(weight, begin, end, levels, scale, out);
    }
  }
}

}  // namespace qlora_native::cuda
