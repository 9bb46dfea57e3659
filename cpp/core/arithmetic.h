// The exact arithmetic rule, one element at a time. Vector and GPU kernels must give these bits.
//
//   normalized  = x * (1 / absmax)      IEEE fp32; x / absmax where the reciprocal overflows (absmax < 2^-128)
//   scale       = code[q] * nested_absmax + offset      product rounded, then sum rounded
//   dequantized = round_to_dtype(level * scale)         one product, one rounding
//
// Everything that includes this is compiled without contraction, so no compiler fuses a product and a sum.
#pragma once

#include <bit>
#include <cstdint>

#include "core/codebook.h"
#include "core/half.h"
#include "core/nested_code.h"

namespace qlora_native {

// How the elements of one block are brought into [-1, 1].
struct Normalizer {
  float factor;
  bool divides;

  QLORA_NATIVE_HD float operator()(float x) const { return divides ? x / factor : x * factor; }
};

// absmax > 0 and finite.
QLORA_NATIVE_HD Normalizer normalizer_of(float absmax) {
  const float reciprocal = 1.0f / absmax;
  const bool overflows = std::bit_cast<uint32_t>(reciprocal) == 0x7f800000u;
  return overflows ? Normalizer{absmax, true} : Normalizer{reciprocal, false};
}

QLORA_NATIVE_HD uint8_t nf4_code(float normalized) {
  constexpr Nf4Boundaries boundaries = nf4_boundaries();
  int code = 0;
  for (int step = 8; step > 0; step >>= 1) {
    code += boundaries.value[code + step - 1] < normalized ? step : 0;
  }
  return static_cast<uint8_t>(code);
}

QLORA_NATIVE_HD uint8_t fp4_code(float normalized) {
  constexpr Fp4Pivots pivots = fp4_pivots();
  constexpr Fp4CodeOfRank code_of_rank = fp4_code_of_rank();
  const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(normalized) & 0x7fffffffu);
  int rank = 0;
  for (int step = 4; step > 0; step >>= 1) {
    rank += pivots.value[rank + step - 1] < magnitude ? step : 0;
  }
  return static_cast<uint8_t>(code_of_rank.code[rank] | (normalized < 0.0f ? 8 : 0));
}

// a b, rounded, plus c.
QLORA_NATIVE_HD float product_plus(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  const float product = a * b;
  return product + c;
#endif
}

QLORA_NATIVE_HD float decode_scale(float nested_level, float nested_absmax, float offset) {
  return product_plus(nested_level, nested_absmax, offset);
}

}  // namespace qlora_native
