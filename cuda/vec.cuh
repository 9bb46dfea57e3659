// Elements to and from fp32 registers, sixteen bytes at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

template <typename T>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));  // elements

// The elements of one 32-bit word, the first in its lowest bits.
template <typename T>
__device__ __forceinline__ void unpack_word(uint32_t word, float* out) = delete;  // [4 / sizeof(T)]

template <>
__device__ __forceinline__ void unpack_word<float>(uint32_t word, float* out) {
  out[0] = __uint_as_float(word);
}

template <>
__device__ __forceinline__ void unpack_word<Bf16>(uint32_t word, float* out) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack_word<Fp16>(uint32_t word, float* out) {
  out[0] = __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
  out[1] = __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
}

// Words of 4 bytes that one load or store moves at once.
template <typename T, size_t kCount>
inline constexpr size_t kWordsOf = kCount * sizeof(T) / 4;

// 8 or a multiple of 16 bytes, and x at a multiple of as many. kStreaming: it is read once.
template <bool kStreaming, typename T, size_t kCount>
__device__ __forceinline__ void load_values(const T* x,  // [kCount]
                                            float (&out)[kCount]) {
  constexpr size_t kWords = kWordsOf<T, kCount>;
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  static_assert(kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 2) {
    const auto* at = reinterpret_cast<const uint2*>(x);
    const uint2 v = kStreaming ? __ldcs(at) : *at;
    unpack_word<T>(v.x, out);
    unpack_word<T>(v.y, out + kPerWord);
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); i += kPerVector<T>) {
      const uint4 v = kStreaming ? wp::load_16_streaming(x + i) : wp::load_16(x + i);
      unpack_word<T>(v.x, out + i);
      unpack_word<T>(v.y, out + i + kPerWord);
      unpack_word<T>(v.z, out + i + 2 * kPerWord);
      unpack_word<T>(v.w, out + i + 3 * kPerWord);
    }
  }
}

// The first `count` elements, one by one; zeros after them.
template <typename T, size_t kCount>
__device__ __forceinline__ void load_first(const T* x,  // [count]
                                           int count, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount); ++i) {
    out[i] = i < count ? to_float(x[i]) : 0.0f;
  }
}

// Rounded to T; sizes and addresses as for load_values.
template <typename T, size_t kCount>
__device__ __forceinline__ void store_values(T* x,  // [kCount]
                                             const float (&values)[kCount]) {
  constexpr size_t kWords = kWordsOf<T, kCount>;
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  static_assert(kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(x) = make_uint2(wp::pack_word<T>(values), wp::pack_word<T>(values + kPerWord));
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); i += kPerVector<T>) {
      const float* v = values + i;
      wp::store_16(x + i, make_uint4(wp::pack_word<T>(v), wp::pack_word<T>(v + kPerWord),
                                     wp::pack_word<T>(v + 2 * kPerWord), wp::pack_word<T>(v + 3 * kPerWord)));
    }
  }
}

template <typename T, size_t kCount>
__device__ __forceinline__ void store_first(T* x,  // [count]
                                            int count, const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount); ++i) {
    if (i < count) {
      x[i] = from_float<T>(values[i]);
    }
  }
}

// Up to 8 consecutive elements of a row of a matrix; zeros beyond it.
template <typename T>
__device__ __forceinline__ uint4 load_eight(const T* matrix,  // [rows, columns]
                                            int64_t row, int64_t column, int64_t rows, int64_t columns) {
  if (row >= rows || column >= columns) {
    return make_uint4(0, 0, 0, 0);
  }
  const T* from = matrix + row * columns + column;
  if (columns % 8 == 0) {
    return wp::load_16(from);
  }
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < columns) {
      words[i / 2] |= static_cast<uint32_t>(from[i].bits) << (i % 2 * 16);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Up to 8 consecutive elements of a row of a matrix, those that exist.
template <typename T>
__device__ __forceinline__ void store_eight(T* matrix,  // [rows, columns]
                                            int64_t row, int64_t column, int64_t rows, int64_t columns, uint4 values) {
  if (row >= rows || column >= columns) {
    return;
  }
  T* to = matrix + row * columns + column;
  if (columns % 8 == 0) {
    wp::store_16(to, values);
    return;
  }
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < columns) {
      to[i] = T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))};
    }
  }
}

}  // namespace qlora_native::cuda
