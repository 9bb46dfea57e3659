// One pass from values to packed codes and scales, bound by memory: 2 or 4 bytes in, 0.5 and a scale out per element.
//
// A thread block takes a chunk of 4096 elements, the largest block of a weight, into registers: a warp two tiles of 256
// elements, a lane eight consecutive ones of each. So loads and stores of a warp are contiguous, and the largest
// magnitude of a weight's block comes out of shuffles, and beyond a tile out of shared memory.
//
// A code is found as on the CPU (core/codebook.h): the cell of [-1, 1] that the value lies in has at most one decision
// point. Cells stand in shared memory, one bank each, so lanes that read different ones meet different banks.
#pragma once

#include <cstdint>

#include "core/arithmetic.h"
#include "core/codebook.h"
#include "core/layout.h"
#include "core/nested_code.h"
#include "cuda/grid.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kPerLane = 8;                // elements, one word of codes
inline constexpr int kTile = 32 * kPerLane;       // elements that a warp takes at once
inline constexpr int kQuantizeChunk = kMaxBlock;  // elements
inline constexpr int kTilesPerChunk = kQuantizeChunk / kTile;
inline constexpr int kTilesPerThread = kQuantizeChunk / (kQuantizeThreads * kPerLane);
static_assert(kQuantizeChunk % (kQuantizeThreads * kPerLane) == 0);

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr uint32_t kInfinity = 0x7f800000u;  // bits; those of NaN lie above
inline constexpr uint32_t kMagnitude = 0x7fffffffu;

// NF4: codes[cell] is the code below the decision point, the next one lies above it. FP4, whose cells are those of
// magnitudes: the code below in the low byte, the one above in the next.
struct CellTable {
  float decision[32];
  uint32_t codes[32];
};

constexpr CellTable cell_table(QuantType type) {
  CellTable table{};
  constexpr CodeCells<32> nf4 = nf4_cells();
  constexpr Fp4CodeCells fp4 = fp4_code_cells();
  for (int i = 0; i < 32; ++i) {
    if (type == QuantType::kNf4) {
      table.decision[i] = nf4.decision[i];
      table.codes[i] = static_cast<uint32_t>(nf4.lower[i]);
    } else {
      table.decision[i] = fp4.pivot[i % 16];
      table.codes[i] = static_cast<uint32_t>(fp4.below[i % 16] | fp4.above[i % 16] << 8);
    }
  }
  return table;
}

template <QuantType kType>
__device__ constexpr CellTable kCellTable = cell_table(kType);

__device__ constexpr NestedCells kNestedCellTable = kNestedCells;

template <QuantType kType>
__device__ __forceinline__ uint32_t code_of(float normalized,
                                            const float* decision,    // [32], shared
                                            const uint32_t* codes) {  // [32], shared
  const float v = kType == QuantType::kNf4 ? normalized : fabsf(normalized);
  const uint32_t cell = __float_as_uint(__fmaf_rn(v, kCellsPerUnit, kCellMagic)) & 31u;
  const bool above = v > decision[cell];
  if (kType == QuantType::kNf4) {
    return codes[cell] + (above ? 1u : 0u);
  }
  const uint32_t pair = codes[cell];
  return (above ? pair >> 8 : pair & 255u) | (normalized < 0.0f ? 8u : 0u);
}

// Eight codes as a little-endian word, the even element in the high nibble of each byte. An absmax of 0 gives the code
// of 0.
template <QuantType kType>
__device__ __forceinline__ uint32_t encode_word(const float (&x)[kPerLane], float absmax,
                                                const float* decision,    // [32], shared
                                                const uint32_t* codes) {  // [32], shared
  const Normalizer by = absmax > 0.0f ? normalizer_of(absmax) : Normalizer{0.0f, false};
  float v[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    v[i] = x[i] * by.factor;
  }
  if (by.divides) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      v[i] = x[i] / by.factor;
    }
  }
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    word |= code_of<kType>(v[i], decision, codes) << (i % 2 == 0 ? 4 * i + 4 : 4 * i - 4);
  }
  return word;
}

// Bits of the largest magnitude; what is not finite is reported.
__device__ __forceinline__ uint32_t highest_of(const float (&x)[kPerLane], int64_t at,
                                               unsigned long long* first_bad) {  // [1]
  uint32_t highest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t bits = __float_as_uint(x[i]) & kMagnitude;
    highest = bits > highest ? bits : highest;
  }
  if (highest >= kInfinity) {
    int i = 0;
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) {
      i = (__float_as_uint(x[j]) & kMagnitude) >= kInfinity ? j : i;
    }
    atomicMin(first_bad, static_cast<unsigned long long>(at + i));
  }
  return highest;
}

// Lanes share the largest value of each group of `lanes`, a power of two up to 32.
__device__ __forceinline__ uint32_t highest_among(uint32_t highest, int lanes) {
  for (int offset = 1; offset < lanes; offset *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, highest, offset);
    highest = other > highest ? other : highest;
  }
  return highest;
}

__device__ __forceinline__ void store_word(uint32_t word, int count, bool vectors,
                                           uint8_t* packed) {  // [ceil(count / 2)]
  if (vectors && count >= kPerLane) {
    *reinterpret_cast<uint32_t*>(packed) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane / 2; ++i) {
    if (2 * i < count) {
      packed[i] = static_cast<uint8_t>(word >> (8 * i));
    }
  }
}

// vectors: x and packed lie at multiples of 16 bytes. block_shift: log2 of the block size. *first_bad is the highest
// number of its type at the start.
template <typename T, QuantType kType>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_4bit_kernel(const T* __restrict__ x,  // [numel]
                         int64_t numel, int block_shift, bool vectors,
                         uint8_t* __restrict__ packed,     // [ceil(numel / 2)]
                         float* __restrict__ absmax,       // [ceil(numel >> block_shift)]
                         unsigned long long* first_bad) {  // [1]
  WP_SHARED(float, decision, 32);
  WP_SHARED(uint32_t, codes, 32);
  WP_SHARED(uint32_t, tile_highest, kTilesPerChunk);
  if (threadIdx.x < 32) {
    decision[threadIdx.x] = kCellTable<kType>.decision[threadIdx.x];
    codes[threadIdx.x] = kCellTable<kType>.codes[threadIdx.x];
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes_per_block = block_shift < 8 ? (1 << block_shift) / kPerLane : 32;
  const int tiles_per_block = block_shift < 8 ? 1 : 1 << (block_shift - 8);
  const int64_t stride = first_item(gridDim.x, kQuantizeChunk);
  for (int64_t begin = first_item(blockIdx.x, kQuantizeChunk); begin < numel; begin += stride) {
    float values[kTilesPerThread][kPerLane];
    uint32_t highest[kTilesPerThread];
    const int64_t first = begin + thread * kPerLane;
    constexpr int kStep = kQuantizeThreads * kPerLane;
    if (vectors && begin + kQuantizeChunk <= numel) {
#pragma unroll
      for (int t = 0; t < kTilesPerThread; ++t) {
        load_values<true>(x + first + t * kStep, values[t]);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kTilesPerThread; ++t) {
        load_first(x + first + t * kStep, at_most(numel - first - t * kStep, kPerLane), values[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTilesPerThread; ++t) {
      highest[t] = highest_among(highest_of(values[t], first + t * kStep, first_bad), lanes_per_block);
    }
    if (tiles_per_block > 1) {
      __syncthreads();  // the last round's have been read
#pragma unroll
      for (int t = 0; t < kTilesPerThread; ++t) {
        if (thread % 32 == 0) {
          tile_highest[thread / 32 + t * kStep / kTile] = highest[t];
        }
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < kTilesPerThread; ++t) {
        const int tile = (thread / 32 + t * kStep / kTile) / tiles_per_block * tiles_per_block;
        for (int i = tile; i < tile + tiles_per_block; ++i) {
          highest[t] = tile_highest[i] > highest[t] ? tile_highest[i] : highest[t];
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTilesPerThread; ++t) {
      const int64_t at = first + t * kStep;
      const float largest = __uint_as_float(highest[t]);
      if (at < numel) {
        store_word(encode_word<kType>(values[t], largest, decision, codes), at_most(numel - at, kPerLane), vectors,
                   packed + at / 2);
        if ((at >> block_shift) << block_shift == at) {
          absmax[at >> block_shift] = largest;
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Double quantization: a warp adds up 256 scales, one thread the groups' sums, a thread block encodes 256 scales.

inline constexpr int kNestedThreads = static_cast<int>(kNestedBlock);
inline constexpr int kWarpsOfSums = 4;

// sums[g] = the scales of group g by a halving tree over 256 slots: the order of cpu/kernels/scales-inl.h.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps) sum_groups_kernel(const float* __restrict__ absmax,  // [blocks]
                                                                 int64_t blocks, int64_t groups,
                                                                 double* __restrict__ sums) {  // [groups]
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const int64_t stride = first_item(gridDim.x, kWarps);
  for (int64_t g = first_item(blockIdx.x, kWarps) + threadIdx.x / 32; g < groups; g += stride) {
    double slot[8];  // lane + 32 i
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t at = g * kNestedBlock + lane + 32 * i;
      slot[i] = at < blocks ? static_cast<double>(absmax[at]) : 0.0;
    }
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) {
        slot[i] += slot[i + half];
      }
    }
    for (int half = 16; half > 0; half /= 2) {
      slot[0] += __shfl_xor_sync(kAllLanes, slot[0], half);
    }
    if (lane == 0) {
      sums[g] = slot[0];
    }
  }
}

// The groups one after another, as on the CPU, by one thread; the others fetch for it.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) mean_kernel(const double* __restrict__ sums,  // [groups]
                                                        int64_t groups, int64_t blocks,
                                                        float* nested_offset) {  // [1]
  WP_SHARED(double, fetched, size_t{kThreads});
  double total = 0.0;
  for (int64_t begin = 0; begin < groups; begin += kThreads) {
    __syncthreads();  // the last round's have been added
    fetched[threadIdx.x] = begin + threadIdx.x < groups ? sums[begin + threadIdx.x] : 0.0;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 16
      for (int i = 0; i < kThreads; ++i) {
        total += fetched[i];  // a sum of magnitudes: adding 0 changes nothing
      }
    }
  }
  if (threadIdx.x == 0) {
    *nested_offset = static_cast<float>(total / static_cast<double>(blocks));
  }
}

// nearest_nested_code() by one look-up; see NestedCells.
__device__ __forceinline__ uint8_t nested_code_of(float normalized) {
  const uint32_t bits = __float_as_uint(normalized);
  uint32_t magnitude = bits & kMagnitude;
  magnitude = magnitude > NestedCells::kLowest ? magnitude : NestedCells::kLowest;
  uint32_t cell = (magnitude >> NestedCells::kShift) - NestedCells::kFirst;
  cell = cell < NestedCells::kCount ? cell : NestedCells::kCount - 1;  // of what is not finite
  const uint32_t entry = kNestedCellTable.entry[cell];
  const bool beyond = (magnitude & NestedCells::kLowMask) > (entry & NestedCells::kLowMask);
  const int positive = static_cast<int>(entry >> 24) + (beyond ? 1 : 0);
  const int negative = 2 * kNestedZero - positive;
  return static_cast<uint8_t>(bits >> 31 == 0 ? positive : negative > 0 ? negative : 0);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) quantize_scales_kernel(const float* __restrict__ absmax,  // [blocks]
                                                                   int64_t blocks, int64_t groups,
                                                                   const float* nested_offset,           // [1]
                                                                   uint8_t* __restrict__ codes,          // [blocks]
                                                                   float* __restrict__ nested_absmax) {  // [groups]
  static_assert(kThreads == kNestedBlock);
  WP_SHARED(uint32_t, warp_highest, size_t{kThreads / 32});
  const float offset = *nested_offset;
  for (int64_t g = blockIdx.x; g < groups; g += gridDim.x) {
    const int64_t at = g * kNestedBlock + threadIdx.x;
    const float centered = at < blocks ? absmax[at] - offset : 0.0f;
    uint32_t highest = highest_among(__float_as_uint(centered) & kMagnitude, 32);
    __syncthreads();  // the last round's have been read
    if (threadIdx.x % 32 == 0) {
      warp_highest[threadIdx.x / 32] = highest;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) {
      highest = warp_highest[i] > highest ? warp_highest[i] : highest;
    }
    const float largest = __uint_as_float(highest);
    if (at < blocks) {
      codes[at] = highest == 0 ? static_cast<uint8_t>(kNestedZero) : nested_code_of(normalizer_of(largest)(centered));
    }
    if (threadIdx.x == 0) {
      nested_absmax[g] = largest;
    }
  }
}

}  // namespace qlora_native::cuda
