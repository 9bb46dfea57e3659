#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "core/state_code.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

// The codes and their ends; that they are nearest, over every float of [2^-31, 1] with 12 bits of significand.
void check_code(const StateCode& code, int first) {
  CHECK(decode_magnitude(code, 0) == 0.0f, "0 is %a", static_cast<double>(decode_magnitude(code, 0)));
  CHECK(decode_magnitude(code, code.top) == 1.0f, "top is %a", static_cast<double>(decode_magnitude(code, code.top)));
  std::vector<double> values;
  for (int i = 0; i <= code.top; ++i) {
    values.push_back(static_cast<double>(decode_magnitude(code, i)));
    CHECK(i == 0 || values[static_cast<size_t>(i)] > values[static_cast<size_t>(i) - 1], "not monotone at %d", i);
    // A fused multiply-add must give the same bits: the vector kernels use it.
    const float magnitude = static_cast<float>(i);
    const uint32_t segment = std::bit_cast<uint32_t>(magnitude) >> 23 & 7u;
    CHECK(std::fma(code.b[segment], magnitude, code.a[segment]) == decode_magnitude(code, i), "fused differs at %d", i);
    CHECK(encode_magnitude(code, decode_magnitude(code, i)) == std::max(i, first), "%d does not come back", i);
  }
  int previous = 0;
  for (uint32_t bits = 0x30000000u; bits <= 0x3f800000u; bits += 1u << 12) {
    const float x = std::bit_cast<float>(bits);
    const int got = encode_magnitude(code, x);
    CHECK(got >= previous && got >= first && got <= code.top, "%a becomes %d after %d", static_cast<double>(x), got,
          previous);
    previous = got;
    const auto at = static_cast<size_t>(got);
    const double error = std::fabs(values[at] - static_cast<double>(x));
    for (const size_t other : {at - 1, at + 1}) {
      if (other < values.size() && other >= static_cast<size_t>(first)) {
        const double step = std::fabs(values[other] - values[at]);
        const double better = error - std::fabs(values[other] - static_cast<double>(x));
        CHECK(better <= 4e-3 * step, "%a becomes %d, but %zu is nearer", static_cast<double>(x), got, other);
      }
    }
  }
}

TEST(state_code_signed) { check_code(kSignedState, 0); }
TEST(state_code_unsigned) { check_code(kUnsignedState, 1); }

TEST(state_code_is_odd) {
  for (int i = -127; i <= 127; ++i) {
    const auto code = static_cast<int8_t>(i);
    CHECK(decode_state(kSignedState, static_cast<int8_t>(-i)) == -decode_state(kSignedState, code), "%d", i);
    CHECK(encode_signed(kSignedState, decode_state(kSignedState, code)) == code, "%d does not come back", i);
  }
}

}  // namespace
