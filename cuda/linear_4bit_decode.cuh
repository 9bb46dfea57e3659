// From stored codes to 16-bit operands of the MMA, without a table in memory.
//
// The 16 values that a code can stand for (levels, or levels times one block's scale) are kept as byte planes in eight
// registers, and select_bytes looks four codes up at once: a code's low three bits select among eight bytes, its high
// bit between the two halves. Two planes make 16 bits. That is 21 instructions for eight weights and no bank to
// conflict in; scaling the 16 values instead of the weights of a run also halves the products.
#pragma once

#include <cstdint>

#include "core/arithmetic.h"
#include "core/layout.h"
#include "core/weight_view.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

struct Planes {
  uint32_t low[4];   // byte i of low[j]: the low byte of code 4j + i's value
  uint32_t high[4];  // the high byte
};

// Half of the planes, by the exact rule of dequantization: level * scale is rounded to fp32 and then to T.
template <typename T>
__device__ __forceinline__ void scale_planes(const float4* levels,  // [4], 16 levels
                                             float scale, int half, Planes& planes) {
#pragma unroll
  for (int i = 2 * half; i < 2 * half + 2; ++i) {
    const float4 four = levels[i];
    const float values[4] = {__fmul_rn(four.x, scale), __fmul_rn(four.y, scale), __fmul_rn(four.z, scale),
                             __fmul_rn(four.w, scale)};
    const uint32_t first = wp::pack_word<T>(values);
    const uint32_t second = wp::pack_word<T>(values + 2);
    planes.low[i] = __byte_perm(first, second, 0x6420);
    planes.high[i] = __byte_perm(first, second, 0x7531);
  }
}

__device__ __forceinline__ uint32_t word_of(uint4 vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// What selects the values of eight codes: the low half of each word those of the first four.
struct Selectors {
  uint32_t among_eight;
  uint32_t which_half;

  __device__ explicit Selectors(uint32_t codes)
      : among_eight(codes & 0x77777777), which_half((codes >> 1 & 0x44444444) | 0x32103210) {}
};

// The values of four codes in the order of the weights: the high nibble of a byte comes before the low one.
__device__ __forceinline__ void decode_four(const Planes& planes, uint32_t among_eight, uint32_t which_half,
                                            uint32_t& first, uint32_t& second) {
  const uint32_t low = wp::select_bytes(wp::select_bytes(planes.low[0], planes.low[1], among_eight),
                                        wp::select_bytes(planes.low[2], planes.low[3], among_eight), which_half);
  const uint32_t high = wp::select_bytes(wp::select_bytes(planes.high[0], planes.high[1], among_eight),
                                         wp::select_bytes(planes.high[2], planes.high[3], among_eight), which_half);
  first = __byte_perm(low, high, 0x4051);
  second = __byte_perm(low, high, 0x6273);
}

// The eight values of a word of codes.
__device__ __forceinline__ uint4 decode_eight(const Planes& planes, uint32_t codes) {
  const Selectors of(codes);
  uint4 values;
  decode_four(planes, of.among_eight, of.which_half, values.x, values.y);
  decode_four(planes, of.among_eight >> 16, of.which_half >> 16, values.z, values.w);
  return values;
}

// to_float by one instruction, without its branches.
__device__ __forceinline__ float widened(Bf16 x) { return to_float(x); }
__device__ __forceinline__ float widened(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

// A block's scale as it is stored: what is loaded well before it is decoded.
struct StoredScale {
  float value;  // the scale, or its nested scale
  int code;     // 0 unless double-quantized
};

// The scales of a weight, whether double-quantized or not, without a branch in a loop.
struct Scales {
  const float* values;
  const uint8_t* codes;  // null unless double-quantized
  int group_shift;       // log2 of the blocks that share a value
  float offset;

  __device__ explicit Scales(const WeightView& weight)
      : values(weight.absmax), codes(nullptr), group_shift(0), offset(0.0f) {
    if (weight.absmax == nullptr) {
      values = weight.nested_absmax;
      codes = weight.absmax_codes;
      group_shift = 8;
      static_assert(kNestedBlock == 1 << 8);
      offset = *weight.nested_offset;
    }
  }

  __device__ __forceinline__ StoredScale stored(int64_t block) const {
    return {values[block >> group_shift], codes != nullptr ? codes[block] : 0};
  }

  // One that is stored as it is times 1 plus 0 is itself.
  __device__ __forceinline__ float decoded(StoredScale scale,
                                           const float* nested_code) const {  // [256], or [1] that is 1
    return decode_scale(nested_code[scale.code], scale.value, offset);
  }
};

// The levels, and the code that Scales::decoded takes; a barrier must follow.
template <int kThreads>
__device__ __forceinline__ void fill_tables(const WeightView& weight,
                                            float4* levels,        // [4]
                                            float* nested_code) {  // [256]
  if (threadIdx.x < 4) {
    const float* from = weight.levels + 4 * threadIdx.x;
    levels[threadIdx.x] = make_float4(from[0], from[1], from[2], from[3]);
  }
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) {
    nested_code[i] = weight.absmax == nullptr ? weight.nested_code[i] : 1.0f;
  }
}

// What a lane reads of W for one step of 128: 32 weights of two rows each, and their scales.
struct LaneRuns {
  uint4 codes[2];
};
struct LaneScales {
  StoredScale stored[2];
};

// Rows g and g + 8 of W from a first one on, as lane 4g + t reads them. Those beyond the edge repeat the last one: what
// comes of them is not stored. Offsets within a row have 32 bits, so that an address takes one instruction.
struct LaneRows {
  const uint8_t* packed[2];
  const float* scales[2];         // from the row's first block on, or from the nested scale of that block
  const uint8_t* scale_codes[2];  // or null
  int blocks_before[2];           // the row's first, that share its nested scale
  int block_shift;
  int group_shift;  // of blocks to what `scales` holds

  __device__ LaneRows(const WeightView& weight,  // [n, k]
                      int64_t n, int64_t k, int given_block_shift, int64_t first_row)
      : block_shift(given_block_shift) {
    const bool nested = weight.absmax == nullptr;
    group_shift = nested ? 8 : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t wanted = first_row + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
      const int64_t row = wanted < n ? wanted : n - 1;
      const int64_t block = row * (k >> block_shift);
      packed[half] = weight.packed + row * k / 2;
      scales[half] = nested ? weight.nested_absmax + block / kNestedBlock : weight.absmax + block;
      scale_codes[half] = nested ? weight.absmax_codes + block : nullptr;
      blocks_before[half] = nested ? static_cast<int>(block % kNestedBlock) : 0;
    }
  }

  // Of the run from `column` on, which exists.
  __device__ __forceinline__ LaneRuns runs_of(int column) const {
    LaneRuns runs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      runs.codes[half] = wp::load_16_streaming(packed[half] + column / 2);
    }
    return runs;
  }

  __device__ __forceinline__ LaneScales scales_of(int column) const {
    const int block = column >> block_shift;
    LaneScales found;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      found.stored[half] = {scales[half][(blocks_before[half] + block) >> group_shift],
                            scale_codes[half] != nullptr ? scale_codes[half][block] : 0};
    }
    return found;
  }
};

}  // namespace qlora_native::cuda
