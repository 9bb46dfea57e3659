// The two 8-bit codes of optimizer states: magnitudes relative to the largest of a block of 256, finer near the top.
//
// They are dynamic codes in the manner of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022): the
// segment of magnitudes [2^i, 2^(i+1)) holds 2^i evenly spaced values that span about a decade. Two things differ from
// the table there, so that neither direction needs a search or a gather. The edges of the decades are the powers of two
// nearest to the powers of ten, so the exponent of a value alone determines its segment; and the last four magnitudes
// are evenly spaced down to zero, as subnormal numbers are.
//
//   decode   value = a[s] + b[s] * code      s from the exponent of float(code); b has 16 significant bits, so the
//                                            product is exact and a fused multiply-add gives the same bits
//   encode   code = nearest_even(x * beta[e] + alpha[e])      e from the exponent of x; product rounded, then sum
//
// The first moment takes the signed code: int8, -127..127. The second takes the unsigned one: uint8, 0..255. What is
// encoded unsigned never becomes 0: a second moment that vanished would let its first moment, divided by it, explode.
// (0 stands in blocks whose largest value is 0.)
#pragma once

#include <bit>
#include <cstdint>

#include "core/arithmetic.h"
#include "core/half.h"

namespace qlora_native {

inline constexpr int64_t kStateBlock = 256;  // elements that share one absmax

struct StateCode {
  float a[8];  // by the low three bits of the exponent field of float(code)
  float b[8];
  float alpha[32];  // by the low five bits of the exponent field of x
  float beta[32];
  float lowest;  // magnitudes below it are encoded as if they were it
  int top;       // the code of 1
};

namespace detail {

// x, positive and normal, rounded to 16 significant bits.
constexpr float leading_bits(float x) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x80u) & 0xffffff00u);
}

constexpr double power_of_two(int exponent) {
  double value = 1.0;
  for (int i = 0; i > exponent; --i) {
    value /= 2.0;
  }
  return value;
}

// bits: of the magnitude, 7 or 8.
constexpr StateCode make_state_code(int bits) {
  constexpr int kEdges[] = {-20, -17, -13, -10, -7, -3};  // nearest to log2 of 1e-6, 1e-5, .. 1e-1
  StateCode code{};
  code.top = (1 << bits) - 1;
  const auto edge = [&](int i) { return kEdges[8 - bits + i - 2]; };  // log2 of the value of code 2^i, for i >= 2
  const double step = power_of_two(edge(2) - 2);
  code.b[7] = static_cast<float>(step);  // of code 1
  code.b[0] = static_cast<float>(step);  // of codes 0, 2 and 3
  for (int e = -31; e < edge(2); ++e) {
    code.beta[31 + e] = static_cast<float>(1.0 / step);
  }
  for (int i = 2; i < bits; ++i) {
    const bool last = i == bits - 1;
    const double low = power_of_two(edge(i));
    const double high = last ? 1.0 : power_of_two(edge(i + 1));
    const int count = last ? (1 << i) - 1 : 1 << i;  // the last segment reaches 1 itself
    const float b = leading_bits(static_cast<float>((high - low) / count));
    const float a =
        static_cast<float>(last ? 1.0 - static_cast<double>(b) * code.top : low - static_cast<double>(b) * (1 << i));
    code.a[i - 1] = a;
    code.b[i - 1] = b;
    for (int e = edge(i); e < (last ? 1 : edge(i + 1)); ++e) {
      code.alpha[31 + e] = static_cast<float>(-static_cast<double>(a) / static_cast<double>(b));
      code.beta[31 + e] = static_cast<float>(1.0 / static_cast<double>(b));
    }
  }
  // 2^-31 is the least that five bits of exponent can tell; its signed code is 0.
  code.lowest = static_cast<float>(bits == 8 ? step : power_of_two(-31));
  return code;
}

}  // namespace detail

inline constexpr StateCode kSignedState = detail::make_state_code(7);
inline constexpr StateCode kUnsignedState = detail::make_state_code(8);

QLORA_NATIVE_HD float decode_magnitude(const StateCode& code, int magnitude) {
  const float value = static_cast<float>(magnitude);
  const uint32_t segment = std::bit_cast<uint32_t>(value) >> 23 & 7u;
  const float product = code.b[segment] * value;
  return code.a[segment] + product;
}

// x in [0, 1]; a little above 1 counts as 1.
QLORA_NATIVE_HD int encode_magnitude(const StateCode& code, float x) {
  const float clamped = x < code.lowest ? code.lowest : x;
  const uint32_t exponent = std::bit_cast<uint32_t>(clamped) >> 23 & 31u;
  const float product = clamped * code.beta[exponent];
  const float position = product + code.alpha[exponent];
  const int below = static_cast<int>(position);  // position is not negative
  const float rest = position - static_cast<float>(below);
  const int nearest = below + ((rest > 0.5f || (rest == 0.5f && below % 2 == 1)) ? 1 : 0);
  return nearest < code.top ? nearest : code.top;
}

// `code` is kSignedState or kUnsignedState, or a copy of it.
QLORA_NATIVE_HD float decode_state(const StateCode& code, int8_t value) {
  return value < 0 ? -decode_magnitude(code, -value) : decode_magnitude(code, value);
}

QLORA_NATIVE_HD float decode_state(const StateCode& code, uint8_t value) { return decode_magnitude(code, value); }

QLORA_NATIVE_HD int8_t encode_signed(const StateCode& code, float x) {
  const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7fffffffu);
  const int value = encode_magnitude(code, magnitude);
  return static_cast<int8_t>(std::bit_cast<uint32_t>(x) >> 31 != 0 ? -value : value);
}

QLORA_NATIVE_HD uint8_t encode_unsigned(const StateCode& code, float x) {
  return static_cast<uint8_t>(encode_magnitude(code, x));
}

// How a block of a state is encoded: by its largest magnitude, unless that is 0 or not finite. Then all codes are 0,
// and what is not finite makes the whole block NaN.
class BlockScale {
 public:
  // highest: the bits of the largest magnitude, those of what is not finite lying above all others.
  QLORA_NATIVE_HD explicit BlockScale(uint32_t highest)
      : absmax(std::bit_cast<float>(highest < 0x7f800000u ? highest : 0x7fc00000u)),
        encodes(highest > 0 && highest < 0x7f800000u),
        normalizer(encodes ? normalizer_of(absmax) : Normalizer{0.0f, false}) {}

  float absmax;
  bool encodes;
  Normalizer normalizer;
};

}  // namespace qlora_native
