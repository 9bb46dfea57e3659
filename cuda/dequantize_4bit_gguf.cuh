// Values of GGUF's blocks, by the scalar decoder of core/gguf.h: one pass, bound by memory.
//
// Blocks of 18 to 210 bytes hold what neighboring lanes need at odd distances, so a warp first copies the bytes of 1024
// elements to shared memory as they lie, by the widest words that their address allows, and decodes from there. Lanes
// write vectors side by side, as dequantize_4bit.cuh does; the elements of a vector share a scale.
#pragma once

#include <cstdint>

#include "core/gguf.h"
#include "cuda/dequantize_4bit.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/grid.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

template <QuantType kType>
inline constexpr BlockFormat kFormatOf = kBlockFormats[static_cast<int>(kType)];

template <QuantType kType>
inline constexpr int kGgufTileBytes = kDequantizeTile / kFormatOf<kType>.elements * kFormatOf<kType>.bytes;

// Where an element's block begins.
template <QuantType kType>
__device__ __forceinline__ const uint8_t* block_at(const uint8_t* packed, int64_t element) {
  return packed + element / kFormatOf<kType>.elements * kFormatOf<kType>.bytes;
}

// Eight levels of a type that has a table, the first in the lowest byte: a table that is indexed would lie in local
// memory.
constexpr uint64_t levels_word(QuantType type, int first) {
  uint64_t word = 0;
  for (int i = first + 7; i >= first; --i) {
    word = word << 8 | static_cast<uint8_t>(code_levels(type).value[i]);
  }
  return word;
}

// As Gguf<kType>::code.
template <QuantType kType>
__device__ __forceinline__ float code_at(const uint8_t* block, int i) {
  if constexpr (has_levels(kType)) {
    constexpr uint64_t kLow = levels_word(kType, 0);
    constexpr uint64_t kHigh = levels_word(kType, 8);
    const int nibble = nibble_of_32(block + kFormatOf<kType>.bytes - 16, i);
    return static_cast<float>(static_cast<int8_t>((nibble < 8 ? kLow : kHigh) >> (nibble % 8 * 8)));
  } else {
    return static_cast<float>(Gguf<kType>::code(block, i));
  }
}

// An element whose scale is known.
template <QuantType kType>
__device__ __forceinline__ float value_at(const uint8_t* block, int i, const GgufScale& scale) {
  const float code = code_at<kType>(block, i);
  return Gguf<kType>::kAdds ? product_plus(code, scale.factor, scale.addend) : __fmul_rn(code, scale.factor);
}

// By a warp; both addresses allow words.
template <typename Word>
__device__ __forceinline__ void copy_words(const uint8_t* from, uint8_t* to, int num_bytes) {
  for (int i = static_cast<int>(threadIdx.x % 32); i < num_bytes / static_cast<int>(sizeof(Word)); i += 32) {
    reinterpret_cast<Word*>(to)[i] = __ldcs(reinterpret_cast<const Word*>(from) + i);
  }
}

// A tile of whole blocks, by a warp.
template <typename T, QuantType kType>
__device__ __forceinline__ void decode_gguf_tile(const uint8_t* blocks,
                                                 uint8_t* staged,  // [kGgufTileBytes<kType>], shared, of this warp
                                                 T* out) {         // [kDequantizeTile], 16-byte aligned
  constexpr int kBytes = kGgufTileBytes<kType>;
  static_assert(kBytes % 4 == 0);
  if (are_aligned(4, blocks)) {
    copy_words<uint32_t>(blocks, staged, kBytes);
  } else if (are_aligned(2, blocks)) {
    copy_words<uint16_t>(blocks, staged, kBytes);
  } else {
    copy_words<uint8_t>(blocks, staged, kBytes);
  }
  __syncwarp();
  constexpr int kVector = kPerVector<T>;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x % 32) * kVector; first < kDequantizeTile; first += 32 * kVector) {
    const uint8_t* block = block_at<kType>(staged, first);
    const int at = first % kFormatOf<kType>.elements;
    const GgufScale scale = Gguf<kType>::scale(block, at);
    float values[size_t{kVector}];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = value_at<kType>(block, at + i, scale);
    }
    store_vector(out + first, values);
  }
}

// vectors: every run begins at a block, and its output at a multiple of 16 bytes.
template <typename T, QuantType kType>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_gguf_kernel(const uint8_t* __restrict__ packed, bool vectors, const Runs runs,
                           T* __restrict__ out) {  // [runs.count, runs.length]
  constexpr int kWarps = kDequantizeThreads / 32;
  WP_SHARED(uint32_t, staged, size_t{kWarps * kGgufTileBytes<kType> / 4});
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t item = first_item(blockIdx.x, kWarps) + warp;  // a grid has warps enough for 2^44 elements
  if (item >= runs.count * runs.tiles) {
    return;
  }
  const int64_t run = runs.count == 1 ? 0 : item / runs.tiles;
  const int64_t within = (item - run * runs.tiles) * kDequantizeTile;
  const int64_t begin = runs.first + run * runs.apart + within;
  T* tile = out + run * runs.length + within;
  const int count = at_most(runs.length - within, kDequantizeTile);
  if (vectors && count == kDequantizeTile) {
    auto* bytes = reinterpret_cast<uint8_t*>(&staged[0]) + warp * kGgufTileBytes<kType>;
    decode_gguf_tile<T, kType>(block_at<kType>(packed, begin), bytes, tile);
    return;
  }
  for (int i = static_cast<int>(threadIdx.x % 32); i < count; i += 32) {
    const uint8_t* block = block_at<kType>(packed, begin + i);
    const int at = static_cast<int>((begin + i) % kFormatOf<kType>.elements);
    tile[i] = from_float<T>(value_at<kType>(block, at, Gguf<kType>::scale(block, at)));
  }
}

}  // namespace qlora_native::cuda
