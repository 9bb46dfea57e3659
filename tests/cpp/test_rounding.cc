// The conversions inside the vector kernels, exhaustively: rounding through dequantize, widening through quantize.
#include "check.h"
#include "cpu/dequantize_4bit.h"
#include "cpu/quantize_4bit.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

// With a scale of one, decoding codes 0 to 15 is nothing but rounding a table of 16 levels.
template <typename T>
void check_table(const float* levels) {  // [16]
  constexpr int64_t kNumel = 67;         // whole vector steps of every instruction set, and a tail
  uint8_t packed[34];
  for (int i = 0; i < 34; ++i) {
    packed[i] = static_cast<uint8_t>((2 * i % 16) << 4 | (2 * i + 1) % 16);
  }
  const float scales[3] = {1.0f, 1.0f, 1.0f};
  const WeightView weight{packed, scales, nullptr, nullptr, nullptr, nullptr, levels, kNumel, 32};
  T out[kNumel];
  cpu::dequantize_4bit(weight, {kNumel, 0, 1, 0, kNumel}, oracle::Storage<T>::kDtype, out);
  for (int i = 0; i < kNumel; ++i) {
    const double expected = oracle::rounded(oracle::Storage<T>::kFormat, oracle::value_of(levels[i % 16]));
    CHECK(oracle::same(oracle::value_of(out[i]), expected), "element %d: %a gave %a, expected %a", i,
          static_cast<double>(levels[i % 16]), oracle::value_of(out[i]), expected);
  }
}

template <typename T>
void check_tables(std::vector<float> points) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  points.insert(points.end(), {kInfinity, -kInfinity, std::bit_cast<float>(0x7f800001u),
                               std::bit_cast<float>(0xffffffffu), 0.0f, -0.0f, 0x1p-149f, -0x1p-149f});
  points.resize((points.size() + 15) / 16 * 16);
  for (size_t i = 0; i < points.size(); i += 16) {
    check_table<T>(points.data() + i);
  }
}

std::vector<float> random_floats() {
  oracle::Random random(3);
  std::vector<float> points(64000);
  for (float& point : points) {
    point = random.any_finite();
  }
  return points;
}

TEST(kernels_round_to_bf16) {
  check_tables<Bf16>(oracle::turning_points<Bf16>());
  check_tables<Bf16>(random_floats());
}

TEST(kernels_round_to_fp16) {
  check_tables<Fp16>(oracle::turning_points<Fp16>());
  check_tables<Fp16>(random_floats());
}

TEST(kernels_keep_fp32) { check_tables<float>(random_floats()); }

// A block with one element that is not zero has that element's magnitude for its scale.
template <typename T>
void check_widening() {
  constexpr int64_t kBlock = 32;
  std::vector<T> x;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    if (std::isfinite(oracle::value_of(oracle::Storage<T>::kFormat, bits))) {
      x.resize(x.size() + kBlock, T{0});
      x[x.size() - kBlock + bits % kBlock] = oracle::from_bits<T>(bits);  // every lane gets its turn
    }
  }
  const auto numel = static_cast<int64_t>(x.size());
  std::vector<uint8_t> packed(x.size() / 2);
  std::vector<float> absmax(x.size() / kBlock);
  const int64_t bad = cpu::quantize_4bit(x.data(), oracle::Storage<T>::kDtype, numel, kBlock, QuantType::kNf4,
                                         packed.data(), absmax.data());
  CHECK(bad == -1, "%lld", static_cast<long long>(bad));
  for (size_t block = 0; block < absmax.size(); ++block) {
    double expected = 0.0;
    for (size_t i = 0; i < kBlock; ++i) {
      expected = std::max(expected, std::fabs(oracle::value_of(x[block * kBlock + i])));
    }
    CHECK(oracle::same(oracle::value_of(absmax[block]), expected), "block %zu: %a, expected %a", block,
          oracle::value_of(absmax[block]), expected);
  }
}

TEST(kernels_widen_every_bf16) { check_widening<Bf16>(); }
TEST(kernels_widen_every_fp16) { check_widening<Fp16>(); }

}  // namespace
