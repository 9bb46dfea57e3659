// From stored codes to 16-bit operands of the MMA, without a table in memory.
//
// The 16 values that a code can stand for (levels, or levels times one block's scale) are kept as byte planes in eight
// registers, and __byte_perm looks four codes up at once: a code's low three bits select among eight bytes, its high
// bit between the two halves. Two planes make 16 bits. That is 11 instructions for four weights and no bank to
// conflict in; scaling the 16 values instead of the weights of a run also halves the products.
#pragma once

#include <cstdint>

#include "core/arithmetic.h"
#include "core/weight_view.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

struct Planes {
  uint32_t low[4];   // byte i of low[j]: the low byte of code 4j + i's value
  uint32_t high[4];  // the high byte
};

// level * scale is rounded to fp32 and then to T: the exact rule of dequantization.
template <typename T>
__device__ __forceinline__ Planes scaled_planes(const float4* levels,  // [4], 16 levels
                                                float scale) {
  Planes planes;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 four = levels[i];
    const float values[4] = {__fmul_rn(four.x, scale), __fmul_rn(four.y, scale), __fmul_rn(four.z, scale),
                             __fmul_rn(four.w, scale)};
    const uint32_t first = wp::pack_word<T>(values);
    const uint32_t second = wp::pack_word<T>(values + 2);
    planes.low[i] = __byte_perm(first, second, 0x6420);
    planes.high[i] = __byte_perm(first, second, 0x7531);
  }
  return planes;
}

// The values of the four codes in the low half of `codes`, in the order of the weights: the high nibble of a byte comes
// before the low one.
__device__ __forceinline__ void decode_four(const Planes& planes, uint32_t codes, uint32_t& first, uint32_t& second) {
  const uint32_t among_eight = codes & 0x7777;
  const uint32_t which_half = (codes >> 1 & 0x4444) | 0x3210;
  const uint32_t low = __byte_perm(__byte_perm(planes.low[0], planes.low[1], among_eight),
                                   __byte_perm(planes.low[2], planes.low[3], among_eight), which_half);
  const uint32_t high = __byte_perm(__byte_perm(planes.high[0], planes.high[1], among_eight),
                                    __byte_perm(planes.high[2], planes.high[3], among_eight), which_half);
  first = __byte_perm(low, high, 0x4051);
  second = __byte_perm(low, high, 0x6273);
}

// The eight values of a word of codes.
__device__ __forceinline__ uint4 decode_eight(const Planes& planes, uint32_t codes) {
  uint4 values;
  decode_four(planes, codes, values.x, values.y);
  decode_four(planes, codes >> 16, values.z, values.w);
  return values;
}

// to_float by one instruction, without its branches.
__device__ __forceinline__ float widened(Bf16 x) { return to_float(x); }
__device__ __forceinline__ float widened(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

// A block's scale as it is stored: what is loaded well before it is decoded.
struct StoredScale {
  float value;  // the scale, or its nested scale
  int code;     // or -1
};

__device__ __forceinline__ StoredScale stored_scale(const WeightView& weight, int64_t block) {
  if (weight.absmax != nullptr) {
    return {weight.absmax[block], -1};
  }
  return {weight.nested_absmax[block / 256], weight.absmax_codes[block]};
}

__device__ __forceinline__ float scale_of(StoredScale stored,
                                          const float* nested_code,  // [256]
                                          float offset) {
  return stored.code < 0 ? stored.value : decode_scale(nested_code[stored.code], stored.value, offset);
}

}  // namespace qlora_native::cuda
