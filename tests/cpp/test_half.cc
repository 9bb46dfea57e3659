// core/half.h, element by element. The vector paths are held to the same oracle in test_rounding.cc.
#include "check.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

template <typename T>
void check_rounding(float x) {
  const T result = from_float<T>(x);
  const double expected = oracle::rounded(oracle::Storage<T>::kFormat, oracle::value_of(x));
  CHECK(oracle::same(oracle::value_of(result), expected), "%a gave %a, expected %a", static_cast<double>(x),
        oracle::value_of(result), expected);
}

// Every 16-bit pattern to float and back.
template <typename T>
void check_every_pattern() {
  constexpr uint32_t kInfinity = ((1u << oracle::Storage<T>::kFormat.exponent_bits) - 1)
                                 << oracle::Storage<T>::kFormat.mantissa_bits;
  constexpr uint32_t kQuiet = 1u << (oracle::Storage<T>::kFormat.mantissa_bits - 1);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const T half = oracle::from_bits<T>(bits);
    const float wide = to_float(half);
    CHECK(oracle::same(oracle::value_of(wide), oracle::value_of(half)), "0x%04x gave %a", bits,
          static_cast<double>(wide));
    const bool nan = (bits & 0x7fffu) > kInfinity;
    const uint32_t back = from_float<T>(wide).bits;
    CHECK(back == (nan ? bits | kQuiet : bits), "0x%04x came back as 0x%04x", bits, back);
  }
}

template <typename T>
void check_floats() {
  for (const float x : oracle::turning_points<T>()) {
    check_rounding<T>(x);
  }
  oracle::Random random(7);
  for (int i = 0; i < 300000; ++i) {
    check_rounding<T>(random.any_finite());
    check_rounding<T>(random.uniform());
  }
  for (const float x : {0.0f, -0.0f, 0x1p-149f, -0x1p-149f, 0x1p-126f, 0x1p-25f, 0x1.000002p-25f, 65519.996f, 65520.0f,
                        -65520.0f, 0x1.fffffep127f, -0x1.fffffep127f, 0x1.fefffep127f, 0x1.ffp127f}) {
    check_rounding<T>(x);
  }
}

TEST(bf16_every_pattern) { check_every_pattern<Bf16>(); }
TEST(fp16_every_pattern) { check_every_pattern<Fp16>(); }
TEST(bf16_rounds_to_nearest_even) { check_floats<Bf16>(); }
TEST(fp16_rounds_to_nearest_even) { check_floats<Fp16>(); }

TEST(nan_stays_nan) {
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0x7f80ffffu}) {
    const float nan = std::bit_cast<float>(bits);
    CHECK(std::isnan(oracle::value_of(from_float<Bf16>(nan))), "0x%08x to bf16", bits);
    CHECK(std::isnan(oracle::value_of(from_float<Fp16>(nan))), "0x%08x to fp16", bits);
    CHECK(from_float<Bf16>(nan).bits >> 15 == bits >> 31, "0x%08x lost its sign", bits);
    CHECK(from_float<Fp16>(nan).bits >> 15 == bits >> 31, "0x%08x lost its sign", bits);
  }
}

}  // namespace
