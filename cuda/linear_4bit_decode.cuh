// From stored codes to 16-bit operands of the MMA, without a table in memory.
//
// The 16 values that a code can stand for (levels, or levels times one block's scale) are kept as byte planes in eight
// registers, and __byte_perm looks four codes up at once: a code's low three bits select among eight bytes, its high
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
  const uint32_t low = __byte_perm(__byte_perm(planes.low[0], planes.low[1], among_eight),
                                   __byte_perm(planes.low[2], planes.low[3], among_eight), which_half);
  const uint32_t high = __byte_perm(__byte_perm(planes.high[0], planes.high[1], among_eight),
                                    __byte_perm(planes.high[2], planes.high[3], among_eight), which_half);
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

}  // namespace qlora_native::cuda
