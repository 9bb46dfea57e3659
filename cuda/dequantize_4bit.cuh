// One pass from packed codes to values, nested scales included, bound by memory: 0.52 bytes in, 2 or 4 out per element.
//
// A lane decodes a vector of output at a time, and its neighbors the vectors beside it: loads of a warp are
// contiguous, and so are, above all, its 16-byte stores. Gaps between lanes would cost two passes over every sector of
// the output. The codes of a vector never leave a block. The 16 levels stand in shared memory, one bank each, so lanes
// that read different levels meet different banks and lanes that read the same one share it. level * scale is rounded
// to fp32 and then to T, as on the CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/arithmetic.h"
#include "core/layout.h"
#include "core/weight_view.h"
#include "cuda/grid.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kDequantizeThreads = 256;
inline constexpr int kDequantizeTile = 1024;  // elements that a warp takes at once

// What is decoded: runs of elements, as far apart as rows of the weight are long. Whole rows are one run.
struct Runs {
  int64_t first;   // element of the first run
  int64_t count;   // runs
  int64_t length;  // elements of a run
  int64_t apart;   // elements from the start of one to that of the next
  int64_t tiles;   // of a run, the last one may be partial
};

// Codes of one vector of output: kPerVector<T>, as a little-endian word, the even element in the high nibble of each
// byte.
template <typename T>
using PackedVector = std::conditional_t<kPerVector<T> == 8, uint32_t, uint16_t>;

template <typename T>
__device__ __forceinline__ void decode_vector(uint32_t word,
                                              const float* levels,  // [16], shared
                                              float scale,
                                              T* out) {  // [kPerVector<T>], 16-byte aligned
  float values[size_t{kPerVector<T>}];
#pragma unroll
  for (int byte = 0; byte < kPerVector<T> / 2; ++byte) {
    values[2 * byte] = __fmul_rn(levels[word >> (8 * byte + 4) & 15], scale);
    values[2 * byte + 1] = __fmul_rn(levels[word >> (8 * byte) & 15], scale);
  }
  store_values(out, values);
}

// A tile that lies whole within a run, at addresses that allow vectors.
template <typename T>
__device__ __forceinline__ void decode_tile(const WeightView& weight, int block_shift, int64_t begin,
                                            const float* levels,  // [16], shared
                                            T* out) {             // [kDequantizeTile]
  static_assert(kMinBlock % kPerVector<T> == 0);
  constexpr int kApart = 32 * kPerVector<T>;  // elements between a lane's vectors
  constexpr int kVectors = kDequantizeTile / kApart;
  const int first = static_cast<int>(threadIdx.x % 32) * kPerVector<T>;
  PackedVector<T> words[size_t{kVectors}];
  float scales[size_t{kVectors}];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = begin + first + i * kApart;
    words[i] = __ldcs(reinterpret_cast<const PackedVector<T>*>(weight.packed + at / 2));
    scales[i] = weight.scale(at >> block_shift);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    decode_vector(words[i], levels, scales[i], out + first + i * kApart);
  }
}

// Elements [begin, end), one by one: the last tile of a run, and every tile of one whose addresses allow no vectors.
template <typename T>
__device__ __forceinline__ void decode_singly(const WeightView& weight, int block_shift, int64_t begin, int64_t end,
                                              const float* levels,  // [16], shared
                                              T* out) {             // [end - begin]
  for (int64_t at = begin + threadIdx.x % 32; at < end; at += 32) {
    out[at - begin] = from_float<T>(__fmul_rn(levels[weight.code(at)], weight.scale(at >> block_shift)));
  }
}

// vectors: the packed codes and the output of every run begin at multiples of a vector's. block_shift: log2 of
// weight.block_size.
template <typename T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_4bit_kernel(const WeightView weight, int block_shift, bool vectors, const Runs runs,
                           T* __restrict__ out) {  // [runs.count, runs.length]
  WP_SHARED(float, levels, 16);
  if (threadIdx.x < 16) {
    levels[threadIdx.x] = weight.levels[threadIdx.x];
  }
  __syncthreads();
  constexpr int kWarps = kDequantizeThreads / 32;
  const int64_t items = runs.count * runs.tiles;
  for (int64_t item = first_item(blockIdx.x, kWarps) + static_cast<int>(threadIdx.x / 32); item < items;
       item += first_item(gridDim.x, kWarps)) {
    const int64_t run = runs.count == 1 ? 0 : item / runs.tiles;
    const int64_t within = (item - run * runs.tiles) * kDequantizeTile;
    const int64_t begin = runs.first + run * runs.apart + within;
    T* tile = out + run * runs.length + within;
    const int count = at_most(runs.length - within, kDequantizeTile);
    if (vectors && count == kDequantizeTile) {
      decode_tile(weight, block_shift, begin, levels, tile);
    } else {
      decode_singly(weight, block_shift, begin, begin + count, levels, tile);
    }
  }
}

}  // namespace qlora_native::cuda
