#include "caller_state.h"
#include "check.h"
#include "cpu/dequantize_4bit.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

// The panel's elements in row-major order; the buffer ends with the last of them and begins `lead` elements early.
template <typename T>
std::vector<T> decoded(const WeightView& weight, const Panel& panel, size_t lead = 0) {
  const int64_t count = (panel.row_end - panel.row_begin) * (panel.column_end - panel.column_begin);
  std::vector<T> out(lead + static_cast<size_t>(count), oracle::from_bits<T>(0x7fffu));
  cpu::dequantize_4bit(weight, panel, oracle::Storage<T>::kDtype, out.data() + lead);
  return {out.begin() + static_cast<std::ptrdiff_t>(lead), out.end()};
}

std::vector<double> expected_of(const WeightView& weight, oracle::Format format) {
  std::vector<double> expected;
  for (int64_t i = 0; i < weight.numel; ++i) {
    expected.push_back(oracle::dequantized(weight, i, format));
  }
  return expected;
}

template <typename T>
void check_all(const WeightView& weight, const std::vector<double>& expected, const std::vector<T>& out,
               const char* what) {
  CHECK(out.size() == expected.size(), "%s: %zu elements", what, out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    CHECK(oracle::same(oracle::value_of(out[i]), expected[i]), "%s: element %zu is %a, expected %a", what, i,
          oracle::value_of(out[i]), expected[i]);
  }
  CHECK(weight.numel == static_cast<int64_t>(expected.size()), "%s", what);
}

template <typename T>
void check_sizes() {
  for (const int64_t numel : {0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 4097}) {
    for (int64_t block = kMinBlock; block <= kMaxBlock; block *= 2) {
      for (const bool nested : {false, true}) {
        for (const QuantType type : {QuantType::kNf4, QuantType::kFp4}) {
          const oracle::RandomWeight weight(numel, block, nested, type, static_cast<uint64_t>(numel + block));
          const std::vector<double> expected = expected_of(weight.view, oracle::Storage<T>::kFormat);
          const std::string what = "numel " + std::to_string(numel) + ", block " + std::to_string(block);
          for (const size_t lead : {0u, 1u}) {
            check_all(weight.view, expected, decoded<T>(weight.view, {numel, 0, 1, 0, numel}, lead), what.c_str());
          }
        }
      }
    }
  }
}

TEST(dequantize_fp32_of_every_size) { check_sizes<float>(); }
TEST(dequantize_bf16_of_every_size) { check_sizes<Bf16>(); }
TEST(dequantize_fp16_of_every_size) { check_sizes<Fp16>(); }

template <typename T>
void check_gguf() {
  for (const QuantType type : oracle::kGgufTypes) {
    const int64_t block = oracle::block_of(type);
    for (const int64_t blocks : {0, 1, 2, 37}) {
      const int64_t numel = blocks * block;
      const oracle::RandomWeight weight(numel, block, false, type, static_cast<uint64_t>(blocks));
      const std::vector<double> expected = expected_of(weight.view, oracle::Storage<T>::kFormat);
      for (const size_t lead : {0u, 1u}) {
        check_all(weight.view, expected, decoded<T>(weight.view, {numel, 0, 1, 0, numel}, lead),
                  kBlockFormats[static_cast<int>(type)].name);
      }
      for (int64_t element = 0; element < numel; ++element) {  // the scalar decoder
        const float value = with_gguf(type, [&]<QuantType kType>() {
          return gguf_value<kType>(weight.packed.data() + packed_bytes(type, element / block * block),
                                   static_cast<int>(element % block));
        });
        CHECK(oracle::same(value, oracle::gguf_element(weight.view, element)), "element %ld of %s is %a",
              static_cast<long>(element), kBlockFormats[static_cast<int>(type)].name, value);
      }
    }
  }
}

TEST(dequantize_blocks_of_gguf) {
  check_gguf<float>();
  check_gguf<Bf16>();
  check_gguf<Fp16>();
}

template <typename T>
void check_rectangles(int64_t rows, int64_t columns, int64_t block, bool nested, QuantType type = QuantType::kNf4) {
  const oracle::RandomWeight weight(rows * columns, block, nested, type, 21);
  const std::vector<double> expected = expected_of(weight.view, oracle::Storage<T>::kFormat);
  for (int64_t top = 0; top <= rows; ++top) {
    for (int64_t bottom = top; bottom <= rows; ++bottom) {
      for (int64_t left = 0; left <= columns; ++left) {
        for (int64_t right = left; right <= columns; ++right) {
          const std::vector<T> out = decoded<T>(weight.view, {columns, top, bottom, left, right});
          size_t i = 0;
          for (int64_t row = top; row < bottom; ++row) {
            for (int64_t column = left; column < right; ++column, ++i) {
              const double wanted = expected[static_cast<size_t>(row * columns + column)];
              CHECK(oracle::same(oracle::value_of(out[i]), wanted), "[%d, %d] of [%d:%d, %d:%d] is %a, expected %a",
                    static_cast<int>(row), static_cast<int>(column), static_cast<int>(top), static_cast<int>(bottom),
                    static_cast<int>(left), static_cast<int>(right), oracle::value_of(out[i]), wanted);
            }
          }
        }
      }
    }
  }
}

TEST(every_rectangle_fp32) {
  check_rectangles<float>(7, 37, 32, true);
  check_rectangles<float>(3, 67, 32, false);
}
TEST(every_rectangle_bf16) {
  check_rectangles<Bf16>(7, 37, 32, true);
  check_rectangles<Bf16>(3, 67, 32, false);
}
TEST(every_rectangle_fp16) {
  check_rectangles<Fp16>(7, 37, 32, true);
  check_rectangles<Fp16>(3, 67, 64, false);
}
TEST(every_rectangle_of_gguf) {
  check_rectangles<float>(2, 48, 32, false, QuantType::kQ5_1);
  check_rectangles<Bf16>(1, 96, 32, false, QuantType::kQ8_0);
}
TEST(every_rectangle_of_narrow_matrices) {
  check_rectangles<Bf16>(67, 1, 32, true);
  check_rectangles<float>(35, 3, 64, false);
  check_rectangles<Fp16>(1, 129, 32, true);
}

// Decoded values from subnormal to infinite, with the caller's flags as they are and flushing.
template <typename T>
void check_magnitudes() {
  oracle::RandomWeight weight(300 * 32, 32, false, QuantType::kNf4, 2);
  for (size_t i = 0; i < weight.scales.size(); ++i) {
    weight.scales[i] = std::ldexp(1.0f + 0.7f / static_cast<float>(i + 1), static_cast<int>(i) - 160);
  }
  weight.scales[290] = std::numeric_limits<float>::max();
  weight.scales[291] = 0.0f;
  weight.scales[292] = -0x1p-130f;
  const Panel all{weight.view.numel, 0, 1, 0, weight.view.numel};
  const std::vector<double> expected = expected_of(weight.view, oracle::Storage<T>::kFormat);
  check_all(weight.view, expected, decoded<T>(weight.view, all), "any magnitude");
  std::vector<T> flushed;
  {
    const FlushesSubnormals flushes;
    flushed = decoded<T>(weight.view, all);
    CHECK(flushes.still(), "the caller's flags were changed");
  }
  check_all(weight.view, expected, flushed, "caller flushes subnormals");
}

TEST(dequantize_every_magnitude) {
  check_magnitudes<float>();
  check_magnitudes<Bf16>();
  check_magnitudes<Fp16>();
}

std::vector<float> decoded_scales(const WeightView& weight) {
  const int64_t blocks = num_blocks(weight.numel, weight.block_size);
  std::vector<float> scales(static_cast<size_t>(blocks), -1.0f);
  cpu::decode_scales(weight, blocks, scales.data());
  return scales;
}

TEST(decode_scales_of_every_size) {
  for (const int64_t blocks : {0, 1, 255, 256, 257, 1000}) {
    const oracle::RandomWeight weight(blocks * 32, 32, true, QuantType::kNf4, 4);
    const std::vector<float> scales = decoded_scales(weight.view);
    for (size_t i = 0; i < scales.size(); ++i) {
      const double expected = oracle::scale_of(weight.view, static_cast<int64_t>(i));
      CHECK(oracle::same(oracle::value_of(scales[i]), expected), "scale %zu is %a, expected %a", i,
            oracle::value_of(scales[i]), expected);
    }
  }
}

TEST(decode_scales_with_subnormals) {
  oracle::RandomWeight weight(256 * 32, 32, true, QuantType::kNf4, 4);
  for (const int exponent : {-149, -140, -130, -126, -120, 126}) {
    weight.scales[0] = std::ldexp(1.5f, exponent);
    weight.offset = std::ldexp(0.75f, exponent);
    std::vector<float> scales;
    {
      const FlushesSubnormals flushes;
      scales = decoded_scales(weight.view);
    }
    for (size_t i = 0; i < scales.size(); ++i) {
      const double expected = oracle::scale_of(weight.view, static_cast<int64_t>(i));
      CHECK(oracle::same(oracle::value_of(scales[i]), expected), "2^%d, scale %zu is %a, expected %a", exponent, i,
            oracle::value_of(scales[i]), expected);
    }
  }
}

// A product and a sum that must not be fused: with one rounding instead of two most of these scales would differ.
TEST(decode_scales_rounds_twice) {
  oracle::RandomWeight weight(256 * 32, 32, true, QuantType::kNf4, 4);
  weight.scales[0] = 1.1f;
  weight.offset = -0.3f;
  const std::vector<float> scales = decoded_scales(weight.view);
  int fused = 0;
  for (size_t i = 0; i < scales.size(); ++i) {
    const float level = weight.view.nested_code[weight.codes[i]];
    CHECK(oracle::same(oracle::value_of(scales[i]), oracle::scale_of(weight.view, static_cast<int64_t>(i))), "%zu", i);
    fused += std::fma(level, weight.scales[0], weight.offset) != scales[i] ? 1 : 0;
  }
  CHECK(fused > 20, "only %d scales tell fused from unfused", fused);
}

template <typename T>
void check_threads() {
  constexpr int64_t kRows = 601;
  constexpr int64_t kColumns = 499;
  const oracle::RandomWeight weight(kRows * kColumns, 64, true, QuantType::kNf4, 8);
  const std::vector<double> expected = expected_of(weight.view, oracle::Storage<T>::kFormat);
  for (const Panel& panel : {Panel{kColumns, 0, kRows, 0, kColumns}, Panel{kColumns, 3, kRows, 0, kColumns},
                             Panel{kColumns, 1, kRows, 5, kColumns}}) {
    for (const int threads : {1, 4}) {
      const Threads scope(threads);
      const std::vector<T> out = decoded<T>(weight.view, panel);
      size_t i = 0;
      for (int64_t row = panel.row_begin; row < panel.row_end; ++row) {
        for (int64_t column = panel.column_begin; column < panel.column_end; ++column, ++i) {
          CHECK(oracle::same(oracle::value_of(out[i]), expected[static_cast<size_t>(row * kColumns + column)]),
                "element %zu with %d threads", i, threads);
        }
      }
    }
  }
}

TEST(dequantize_does_not_depend_on_threads) {
  check_threads<float>();
  check_threads<Bf16>();
  check_threads<Fp16>();
}

TEST(dequantize_subnormals_on_many_threads_of_a_caller_that_flushes) {
  oracle::RandomWeight weight(300001, 64, false, QuantType::kNf4, 8);
  for (float& scale : weight.scales) {
    scale = std::ldexp(scale, -125);
  }
  const std::vector<double> expected = expected_of(weight.view, oracle::kFloat);
  std::vector<float> out;
  {
    const Threads four(4);
    const FlushesSubnormals flushes;
    out = decoded<float>(weight.view, {weight.view.numel, 0, 1, 0, weight.view.numel});
  }
  check_all(weight.view, expected, out, "four threads");
}

TEST(decode_scales_does_not_depend_on_threads) {
  const oracle::RandomWeight weight(70001 * 32, 32, true, QuantType::kNf4, 8);
  const Threads one(1);
  const std::vector<float> alone = decoded_scales(weight.view);
  const Threads four(4);
  CHECK(decoded_scales(weight.view) == alone, "four threads differ");
}

// Levels and nested code that a checkpoint brings along are used as they are.
TEST(tables_of_the_checkpoint_are_honored) {
  oracle::RandomWeight weight(1000, 64, true, QuantType::kNf4, 6);
  std::vector<float> nested(kNestedCode.value, kNestedCode.value + 256);
  for (float& value : nested) {
    value = std::nextafter(value, 2.0f);
  }
  for (float& value : weight.levels.value) {
    value = std::nextafter(value, -2.0f);
  }
  weight.view.nested_code = nested.data();
  check_all(weight.view, expected_of(weight.view, oracle::kFloat), decoded<float>(weight.view, {1000, 0, 1, 0, 1000}),
            "own tables");
}

}  // namespace
