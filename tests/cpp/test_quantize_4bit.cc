#include "caller_state.h"
#include "check.h"
#include "cpu/quantize_4bit.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

constexpr QuantType kTypes[2] = {QuantType::kNf4, QuantType::kFp4};

struct Quantized {
  Quantized(int64_t numel, int64_t block_size)
      : packed(static_cast<size_t>(packed_bytes(numel))), absmax(static_cast<size_t>(num_blocks(numel, block_size))) {}
  bool operator==(const Quantized&) const = default;

  std::vector<uint8_t> packed;
  std::vector<float> absmax;
  int64_t bad = -2;
};

template <typename T>
Quantized quantized(const std::vector<T>& x, int64_t block_size, QuantType type) {
  const auto numel = static_cast<int64_t>(x.size());
  Quantized result(numel, block_size);
  result.bad = cpu::quantize_4bit(x.data(), oracle::Storage<T>::kDtype, numel, block_size, type, result.packed.data(),
                                  result.absmax.data());
  return result;
}

template <typename T>
Quantized expected_of(const std::vector<T>& x, int64_t block_size, QuantType type) {
  const auto numel = static_cast<int64_t>(x.size());
  Quantized result(numel, block_size);
  result.bad = -1;
  const int zero = type == QuantType::kNf4 ? 7 : 0;
  std::vector<int> codes(x.size() + x.size() % 2, zero);
  for (size_t block = 0; block < result.absmax.size(); ++block) {
    const size_t begin = block * static_cast<size_t>(block_size);
    const size_t end = std::min(x.size(), begin + static_cast<size_t>(block_size));
    double absmax = 0.0;
    for (size_t i = begin; i < end; ++i) {
      absmax = std::max(absmax, std::fabs(oracle::value_of(x[i])));
    }
    result.absmax[block] = static_cast<float>(absmax);
    for (size_t i = begin; i < end && absmax > 0.0; ++i) {
      codes[i] = oracle::code_of(type, oracle::normalized(oracle::value_of(x[i]), absmax));
    }
  }
  for (size_t i = 0; i < result.packed.size(); ++i) {
    result.packed[i] = static_cast<uint8_t>(codes[2 * i] * 16 + codes[2 * i + 1]);
  }
  return result;
}

void check_same(const Quantized& result, const Quantized& expected, const char* what) {
  CHECK(result.bad == expected.bad, "%s: %lld", what, static_cast<long long>(result.bad));
  for (size_t i = 0; i < expected.absmax.size(); ++i) {
    CHECK(oracle::same(oracle::value_of(result.absmax[i]), oracle::value_of(expected.absmax[i])),
          "%s: scale %zu is %a, expected %a", what, i, oracle::value_of(result.absmax[i]),
          oracle::value_of(expected.absmax[i]));
  }
  for (size_t i = 0; i < expected.packed.size(); ++i) {
    CHECK(result.packed[i] == expected.packed[i], "%s: byte %zu is %02x, expected %02x", what, i, result.packed[i],
          expected.packed[i]);
  }
}

// Random values, with a block of zeros and the two largest magnitudes at the ends of the tensor.
template <typename T>
std::vector<T> random_input(size_t numel, int exponent, uint64_t seed) {
  oracle::Random random(seed);
  std::vector<T> x(numel);
  for (size_t i = 0; i < numel; ++i) {
    const bool zero = i / 32 % 5 == 3;
    x[i] = from_float<T>(zero ? std::copysign(0.0f, random.uniform()) : std::ldexp(random.uniform(), exponent));
  }
  if (numel > 0) {
    x.front() = from_float<T>(std::ldexp(-1.0f, exponent));
    x.back() = from_float<T>(std::ldexp(1.0f, exponent));
  }
  return x;
}

template <typename T>
void check_sizes() {
  for (const size_t numel : {0u, 1u, 2u, 31u, 32u, 33u, 63u, 64u, 65u, 127u, 4097u}) {
    const std::vector<T> x = random_input<T>(numel, -4, numel);
    for (int64_t block = kMinBlock; block <= kMaxBlock; block *= 2) {
      for (const QuantType type : kTypes) {
        check_same(quantized(x, block, type), expected_of(x, block, type),
                   ("numel " + std::to_string(numel) + ", block " + std::to_string(block)).c_str());
      }
    }
  }
}

TEST(quantize_fp32_of_every_size) { check_sizes<float>(); }
TEST(quantize_bf16_of_every_size) { check_sizes<Bf16>(); }
TEST(quantize_fp16_of_every_size) { check_sizes<Fp16>(); }

// Scales whose reciprocal overflows, is subnormal or is near to either, down to the smallest subnormal itself.
template <typename T>
void check_magnitudes(int from, int to) {
  for (int exponent = from; exponent <= to; ++exponent) {
    const std::vector<T> x = random_input<T>(200, exponent, static_cast<uint64_t>(exponent + 1000));
    for (const QuantType type : kTypes) {
      const Quantized expected = expected_of(x, 64, type);
      const std::string what = "exponent " + std::to_string(exponent);
      check_same(quantized(x, 64, type), expected, what.c_str());
      Quantized flushed(0, 64);
      {
        const FlushesSubnormals flushes;
        flushed = quantized(x, 64, type);
        CHECK(flushes.still(), "the caller's flags were changed");
      }
      check_same(flushed, expected, (what + ", caller flushes subnormals").c_str());
    }
  }
}

TEST(quantize_fp32_of_every_magnitude) {
  check_magnitudes<float>(-149, -120);
  check_magnitudes<float>(120, 127);
}
TEST(quantize_bf16_of_every_magnitude) {
  check_magnitudes<Bf16>(-133, -120);
  check_magnitudes<Bf16>(120, 127);
}
TEST(quantize_fp16_of_every_magnitude) { check_magnitudes<Fp16>(-24, 15); }

// A block whose largest element is one has its elements for their own normalized values: ties arrive exactly.
TEST(quantize_ties_to_the_lower_code) {
  constexpr Levels levels = nf4_levels();
  constexpr Fp4Pivots pivots = fp4_pivots();
  for (const QuantType type : kTypes) {
    std::vector<float> x;
    for (int i = 0; i < 15; ++i) {
      x.push_back(static_cast<float>(oracle::midpoint(levels.value, i)));
    }
    for (int i = 0; i < 7; ++i) {
      x.insert(x.end(), {pivots.value[i], -pivots.value[i]});
    }
    const size_t ties = x.size();
    for (size_t i = 0; i < ties; ++i) {
      x.insert(x.end(), {std::nextafter(x[i], -2.0f), std::nextafter(x[i], 2.0f)});
    }
    x.push_back(1.0f);
    check_same(quantized(x, 128, type), expected_of(x, 128, type), type == QuantType::kNf4 ? "nf4" : "fp4");
  }
}

template <typename T>
void check_non_finite() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const size_t numel : {1u, 33u, 130u, 100001u}) {
    const std::vector<T> clean = random_input<T>(numel, 0, 5);
    for (const size_t first : {size_t{0}, numel / 3, numel / 2, numel - 1}) {
      for (const float value : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
        for (const int threads : {1, 4}) {
          const Threads scope(threads);
          std::vector<T> x = clean;
          x[first] = from_float<T>(value);
          x.back() = from_float<T>(-value);
          const int64_t bad = quantized(x, 64, QuantType::kNf4).bad;
          CHECK(bad == static_cast<int64_t>(first), "%zu of %zu, but %lld was named", first, numel,
                static_cast<long long>(bad));
        }
      }
    }
  }
}

TEST(non_finite_fp32_is_named) { check_non_finite<float>(); }
TEST(non_finite_bf16_is_named) { check_non_finite<Bf16>(); }
TEST(non_finite_fp16_is_named) { check_non_finite<Fp16>(); }

template <typename T>
void check_threads() {
  const std::vector<T> x = random_input<T>(300001, 0, 9);
  for (const int64_t block : {kMinBlock, int64_t{64}, kMaxBlock}) {
    const Threads one(1);
    const Quantized alone = quantized(x, block, QuantType::kNf4);
    const Threads four(4);
    CHECK(quantized(x, block, QuantType::kNf4) == alone, "block %lld", static_cast<long long>(block));
  }
}

// Every thread of the team must be freed from the flags, not the caller's alone.
TEST(quantize_subnormals_on_many_threads_of_a_caller_that_flushes) {
  const std::vector<float> x = random_input<float>(300001, -135, 9);
  const Quantized expected = quantized(x, 64, QuantType::kNf4);
  const Threads four(4);
  const FlushesSubnormals flushes;
  CHECK(quantized(x, 64, QuantType::kNf4) == expected, "subnormals were flushed");
}

TEST(quantize_does_not_depend_on_threads) {
  check_threads<float>();
  check_threads<Bf16>();
  check_threads<Fp16>();
}

// ---------------------------------------------------------------------------------------------------------------------
// Double quantization

struct Nested {
  explicit Nested(int64_t blocks)
      : codes(static_cast<size_t>(blocks)), absmax(static_cast<size_t>(num_nested_blocks(blocks))) {}
  bool operator==(const Nested&) const = default;

  std::vector<uint8_t> codes;
  std::vector<float> absmax;
  std::vector<float> offset = std::vector<float>(1, -1.0f);
};

Nested nested(const std::vector<float>& scales) {
  const auto blocks = static_cast<int64_t>(scales.size());
  Nested result(blocks);
  cpu::quantize_scales(scales.data(), blocks, result.codes.data(), result.absmax.data(), result.offset.data());
  return result;
}

// The offset is held to a mean in long double; the rest follows from the offset by the rule.
void check_nested(const std::vector<float>& scales, const Nested& result, const char* what) {
  long double sum = 0.0L;
  for (const float scale : scales) {
    sum += static_cast<long double>(oracle::value_of(scale));
  }
  const double offset = oracle::value_of(result.offset[0]);
  const double mean = static_cast<double>(sum / static_cast<long double>(scales.size()));
  CHECK(std::fabs(offset - mean) <= std::max(std::ldexp(std::fabs(mean), -23), 0x1p-149), "%s: offset %a, mean %a",
        what, offset, mean);
  for (size_t group = 0; group < result.absmax.size(); ++group) {
    const size_t end = std::min(scales.size(), group * 256 + 256);
    double highest = 0.0;
    for (size_t i = group * 256; i < end; ++i) {
      highest = std::max(highest, std::fabs(oracle::rounded(oracle::kFloat, oracle::value_of(scales[i]) - offset)));
    }
    CHECK(oracle::same(oracle::value_of(result.absmax[group]), highest), "%s: group %zu is %a, expected %a", what,
          group, oracle::value_of(result.absmax[group]), highest);
    for (size_t i = group * 256; i < end; ++i) {
      const double centered = oracle::rounded(oracle::kFloat, oracle::value_of(scales[i]) - offset);
      const int code = highest == 0.0 ? kNestedZero : oracle::nested_code(oracle::normalized(centered, highest));
      CHECK(result.codes[i] == code, "%s: scale %zu is %d, expected %d", what, i, result.codes[i], code);
    }
  }
}

std::vector<float> random_scales(size_t blocks, int exponent) {
  oracle::Random random(blocks);
  std::vector<float> scales(blocks);
  for (float& scale : scales) {
    scale = std::ldexp(std::fabs(random.uniform()), exponent);
  }
  return scales;
}

TEST(scales_of_every_size) {
  for (const size_t blocks : {1u, 2u, 255u, 256u, 257u, 512u, 1000u}) {
    const std::vector<float> scales = random_scales(blocks, -5);
    check_nested(scales, nested(scales), std::to_string(blocks).c_str());
  }
}

TEST(scales_of_every_magnitude) {
  for (const int exponent : {-149, -145, -140, -130, -129, -128, -127, -126, -125, 120, 125, 126, 127}) {
    const std::vector<float> scales = random_scales(300, exponent);
    const std::string what = "exponent " + std::to_string(exponent);
    check_nested(scales, nested(scales), what.c_str());
    Nested flushed(0);
    {
      const FlushesSubnormals flushes;
      flushed = nested(scales);
      CHECK(flushes.still(), "the caller's flags were changed");
    }
    check_nested(scales, flushed, (what + ", caller flushes subnormals").c_str());
  }
}

TEST(equal_scales_take_the_zero_code) {
  const std::vector<float> scales(300, 0.3125f);
  const Nested result = nested(scales);
  check_nested(scales, result, "equal");
  CHECK(result.offset[0] == 0.3125f && result.absmax[0] == 0.0f && result.codes[299] == kNestedZero, "equal scales");
}

TEST(no_scales_have_a_zero_offset) {
  CHECK(nested({}).offset[0] == 0.0f, "%a", oracle::value_of(nested({}).offset[0]));
}

TEST(scales_do_not_depend_on_threads) {
  const std::vector<float> scales = random_scales(100001, 0);
  const Threads one(1);
  const Nested alone = nested(scales);
  check_nested(scales, alone, "many");
  const Threads four(4);
  CHECK(nested(scales) == alone, "four threads differ");
}

}  // namespace
