// bfloat16 and IEEE binary16 as storage types, and their conversions to and from float.
//
// Every conversion rounds to nearest, ties to even, keeps subnormals and quiets NaN, so that the bytes agree
// with the vector paths and with torch. Forced inline: these headers are compiled several times with different
// instruction-set flags, and a shared out-of-line copy could end up with instructions the machine lacks.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define QLORA_NATIVE_HD __host__ __device__ __forceinline__
#else
#define QLORA_NATIVE_HD __attribute__((always_inline)) inline
#endif

namespace qlora_native {

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

QLORA_NATIVE_HD float to_float(float x) { return x; }

QLORA_NATIVE_HD float to_float(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

QLORA_NATIVE_HD float to_float(Fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN: the exponent field is all ones in both formats
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  if (magnitude < 0x0400u) {  // subnormal: an integer number of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));  // 112 = 127 - 15, the bias difference
}

template <typename T>
T from_float(float x) = delete;

template <>
QLORA_NATIVE_HD float from_float<float>(float x) {
  return x;
}

template <>
QLORA_NATIVE_HD Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return Bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  }
  return Bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
QLORA_NATIVE_HD Fp16 from_float<Fp16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return Fp16{static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  }
  if (magnitude >= 0x477ff000u) {  // 65520, the first value that rounds past the largest finite 65504
    return Fp16{static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the significand so that the sum rounds at 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return Fp16{static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u);
  return Fp16{static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace qlora_native
