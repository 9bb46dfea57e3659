// Both products with a quantized weight, of any shape, against sums in double precision.
#include <cstdlib>
#include <memory>
#include <string>

#include "check.h"
#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "oracle.h"
#include "silicon.h"

using namespace qlora_native;

namespace {

struct Shape {
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t block;
  int64_t r;  // 0: no adapter
  bool bias;
  bool nested;
  QuantType type = QuantType::kNf4;  // or by the block, if the scales lie apart

  bool is_dense_too() const { return !is_gguf(type); }
  QuantType weight_type() const { return is_gguf(type) || block == 64 ? type : QuantType::kFp4; }
};

std::string text(const Shape& s, bool forward) {
  return std::string(forward ? "forward" : "input gradient") + ", m " + std::to_string(s.m) + ", n " +
         std::to_string(s.n) + ", k " + std::to_string(s.k) + ", block " + std::to_string(s.block) + ", r " +
         std::to_string(s.r) + ", " + kBlockFormats[static_cast<int>(s.weight_type())].name;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Calls the kernel on the units between these cuts, each with scratch of exactly the size it asks for.
void run(const cpu::Kernels& kernels, const cpu::GemmJob& job, const std::vector<int64_t>& row_cuts,
         const std::vector<int64_t>& cuts) {
  const cpu::GemmKernels& table = kernels.gemm[static_cast<int>(job.dtype)];
  for (size_t row = 0; row + 1 < row_cuts.size(); ++row) {
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      const int64_t bytes = table.unit_bytes(job, row_cuts[row + 1] - row_cuts[row], cuts[i + 1] - cuts[i]);
      const std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, static_cast<size_t>(bytes)));
      std::memset(scratch.get(), 0xff, static_cast<size_t>(bytes));  // NaN: what is not written must not be read
      table.product(job, {row_cuts[row], row_cuts[row + 1], cuts[i], cuts[i + 1]}, scratch.get());
    }
  }
}

template <typename T>
void check_product(const cpu::Kernels& kernels, const Shape& s, bool forward, bool is_dense) {
  const oracle::RandomWeight weight(s.n * s.k, s.block, s.nested, s.weight_type(), static_cast<uint64_t>(s.n + s.k));
  oracle::Random random(static_cast<uint64_t>(s.m));
  const int64_t columns = forward ? s.n : s.k;
  const int64_t depth = forward ? s.k : s.n;
  const std::vector<T> x = oracle::uniform_values<T>(random, s.m * depth);
  const std::vector<T> bias = oracle::uniform_values<T>(random, columns);
  const std::vector<T> low = oracle::uniform_values<T>(random, s.m * s.r);
  const std::vector<T> up = oracle::uniform_values<T>(random, columns * s.r);
  const std::vector<T> w = oracle::uniform_values<T>(random, is_dense ? s.n * s.k : 0);
  std::vector<T> y(static_cast<size_t>(s.m * columns));
  const float scale = is_dense ? 0.75f : 1.0f;
  cpu::GemmJob job{{weight.view, oracle::Storage<T>::kDtype, forward, x.data(), s.bias ? bias.data() : nullptr,
                    s.r > 0 ? low.data() : nullptr, s.r > 0 ? up.data() : nullptr, s.r, y.data(), s.m, s.n, s.k}};
  job.dense = is_dense ? w.data() : nullptr;
  job.scale = scale;
  run(kernels, job, {0, s.m}, {0, columns});
  silicon::add(y);

  // Operands in the order of the sum, each a row: the products are then of two contiguous rows.
  std::vector<double> dense(static_cast<size_t>(s.n * s.k));
  for (int64_t i = 0; i < s.n * s.k; ++i) {
    const int64_t at = forward ? i : i % s.k * s.n + i / s.k;
    dense[static_cast<size_t>(at)] = is_dense ? oracle::value_of(w[static_cast<size_t>(i)])
                                              : oracle::dequantized(weight.view, i, oracle::Storage<T>::kFormat);
  }
  const std::vector<double> a = oracle::doubles_of(x);
  const std::vector<double> small = oracle::doubles_of(low);
  const std::vector<double> large = oracle::doubles_of(up);
  constexpr oracle::Format kFormat = oracle::Storage<T>::kFormat;
  constexpr double kStep = 1.0 / static_cast<double>(int64_t{2} << kFormat.mantissa_bits);
  const double smallest = oracle::value_of(kFormat, 1);
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double expected = s.bias ? oracle::value_of(bias[static_cast<size_t>(j)]) : 0.0;
      double magnitude = std::fabs(expected);
      const auto add = [&](double product) {
        expected += scale * product;
        magnitude += std::fabs(product);
      };
      for (int64_t l = 0; l < depth; ++l) {
        add(a[static_cast<size_t>(i * depth + l)] * dense[static_cast<size_t>(j * depth + l)]);
      }
      for (int64_t l = 0; l < s.r; ++l) {
        add(small[static_cast<size_t>(i * s.r + l)] *
            large[static_cast<size_t>(forward ? j * s.r + l : l * columns + j)]);
      }
      // One rounding of the result, and sums in fp32 whose errors grow like the root of their length.
      const double tolerance =
          kStep * std::fabs(expected) + smallest / 2.0 + 0x1p-24 * magnitude * (4.0 + std::sqrt(depth));
      const double got = oracle::value_of(y[static_cast<size_t>(i * columns + j)]);
      CHECK(std::fabs(got - expected) <= tolerance, "%s: [%ld, %ld] is %a, expected %a", text(s, forward).c_str(),
            static_cast<long>(i), static_cast<long>(j), got, expected);
    }
  }

  const std::vector<T> whole = y;
  std::vector<int64_t> cuts;
  for (int64_t cut = 0; cut < columns; cut += cpu::kColumnGrain * (1 + cut / cpu::kColumnGrain % 2)) {
    cuts.push_back(cut);
  }
  cuts.push_back(columns);
  std::memset(y.data(), 0xff, y.size() * sizeof(T));
  run(kernels, job, {0, (s.m + 2) / 3, s.m}, cuts);
  CHECK(std::memcmp(whole.data(), y.data(), y.size() * sizeof(T)) == 0, "%s: cut into units it gives other bits",
        text(s, forward).c_str());
}

template <typename T>
void check_both_ways(const cpu::Kernels& kernels, const std::vector<Shape>& shapes) {
  for (const Shape& shape : shapes) {
    Shape gradient = shape;
    gradient.bias = false;
    for (const bool is_dense : {false, true}) {
      if (shape.is_dense_too() || !is_dense) {
        check_product<T>(kernels, shape, true, is_dense);
        check_product<T>(kernels, gradient, false, is_dense);
      }
    }
  }
}

template <typename T>
void check_shapes(const cpu::Kernels& kernels) {
  std::vector<Shape> shapes;
  for (int64_t m = 1; m <= 14; ++m) {  // every height of a tile
    shapes.push_back({m, 70, 192, 64, 0, m % 2 == 0, true});
  }
  for (const int64_t block : {32, 64, 128, 4096}) {  // rows that are blocks, multiples of blocks, and neither
    for (const int64_t k : {1, 31, 32, 64, 96, 129, 256, 320, 352, 1056}) {
      shapes.push_back({3, 37, k, block, 0, true, block != 64});
    }
  }
  for (const int64_t n : {1, 2, 15, 16, 17, 31, 33, 64, 65, 255, 257, 515, 640}) {
    shapes.push_back({5, n, 64, 32, 0, false, true});
    shapes.push_back({5, n, 77, 32, 3, true, true});
  }
  for (const int64_t r : {1, 2, 7, 16, 64, 65, 100, 200, 300}) {  // beside the last span of the depth, and in its own
    shapes.push_back({7, 40, 512, 64, r, true, true});
    shapes.push_back({7, 41, 67, 64, r, false, false});
  }
  shapes.push_back({2, 3, 4096, 4096, 8, true, true});
  shapes.push_back({2, 530, 530, 64, 0, false, true});  // more columns than a chunk has
  shapes.push_back({197, 33, 96, 32, 5, true, true});   // more rows than a block has
  shapes.push_back({1030, 5, 64, 64, 1, true, true});   // more rows than a chunk has
  check_both_ways<T>(kernels, shapes);
}

template <typename T>
void check_gguf(const cpu::Kernels& kernels) {
  std::vector<Shape> shapes;
  for (const QuantType type : oracle::kGgufTypes) {
    const int64_t block = oracle::block_of(type);
    for (const int64_t k : {block, 3 * block, 640 / block * block}) {
      shapes.push_back({3, 37, k, block, 0, true, false, type});
      shapes.push_back({14, 70, k, block, 5, false, false, type});
    }
    shapes.push_back({9, 40, 544, block, 0, true, false, type});  // rows that begin inside a block of 256
  }
  shapes.push_back({270, 66, 2112, 32, 9, true, false, QuantType::kQ4_1});  // many rows, several spans
  shapes.push_back({3, 64, 40, 32, 0, true, false, QuantType::kQ5_0});      // rows that begin inside a block
  shapes.push_back({5, 32, 77, 32, 3, true, false, QuantType::kQ8_0});
  check_both_ways<T>(kernels, shapes);
}

TEST(product_fp32) { check_shapes<float>(cpu::kernels()); }
TEST(product_bf16) { check_shapes<Bf16>(cpu::kernels()); }
TEST(product_fp16) { check_shapes<Fp16>(cpu::kernels()); }
TEST(product_gguf_fp32) { check_gguf<float>(cpu::kernels()); }
TEST(product_gguf_bf16) { check_gguf<Bf16>(cpu::kernels()); }
TEST(product_gguf_fp16) { check_gguf<Fp16>(cpu::kernels()); }

#if defined(__x86_64__)
// Where multiply-adds are faster than dot products of pairs, the table of this machine leaves the latter out.
TEST(product_bf16_by_dot_products_of_pairs) {
  if (cpu::current_isa() == cpu::Isa::kAvx512Bf16) {
    check_shapes<Bf16>(cpu::avx512_bf16_kernels());
  }
}
TEST(product_gguf_bf16_by_dot_products_of_pairs) {
  if (cpu::current_isa() == cpu::Isa::kAvx512Bf16) {
    check_gguf<Bf16>(cpu::avx512_bf16_kernels());
  }
}
#endif

template <typename T>
void check_empty_depth() {
  const oracle::RandomWeight weight(0, 64, false, QuantType::kNf4, 1);
  const std::vector<T> bias{from_float<T>(1.0f), from_float<T>(2.0f), from_float<T>(3.0f)};
  for (const bool with_bias : {false, true}) {
    std::vector<T> y(6, from_float<T>(-1.0f));
    run(cpu::kernels(),
        {{weight.view, oracle::Storage<T>::kDtype, true, nullptr, with_bias ? bias.data() : nullptr, nullptr, nullptr,
          0, y.data(), 2, 3, 0}},
        {0, 2}, {0, 3});
    for (size_t i = 0; i < y.size(); ++i) {
      CHECK(to_float(y[i]) == (with_bias ? to_float(bias[i % 3]) : 0.0f), "%zu is %g", i, to_float(y[i]));
    }
  }
}

TEST(product_of_an_empty_depth) {
  check_empty_depth<float>();
  check_empty_depth<Bf16>();
  check_empty_depth<Fp16>();
}

TEST(product_of_no_rows) {
  const oracle::RandomWeight weight(3 * 64, 64, true, QuantType::kNf4, 1);
  cpu::GemmJob job{};
  job.weight = weight.view;
  job.n = 3;
  job.k = 64;
  job.forward = true;
  run(cpu::kernels(), job, {0, 0}, {0, 3});
  job.dtype = Dtype::kBfloat16;
  job.forward = false;
  run(cpu::kernels(), job, {0, 0}, {0, 64});
}

// A scale that is not a number shows in every output that it touches, and in no other.
template <typename T>
void check_nan() {
  oracle::RandomWeight weight(40 * 64, 64, false, QuantType::kNf4, 3);
  weight.scales[17] = std::bit_cast<float>(0x7fffffffu);
  const std::vector<T> x(3 * 64, from_float<T>(0.5f));
  for (const bool forward : {true, false}) {
    const int64_t columns = forward ? 40 : 64;
    std::vector<T> y(static_cast<size_t>(3 * columns));
    run(cpu::kernels(),
        {{weight.view, oracle::Storage<T>::kDtype, forward, x.data(), nullptr, nullptr, nullptr, 0, y.data(), 3, 40,
          64}},
        {0, 3}, {0, columns});
    for (size_t i = 0; i < y.size(); ++i) {
      const bool touched = !forward || i % 40 == 17;
      CHECK(std::isnan(oracle::value_of(y[i])) == touched, "%d, %zu", forward ? 1 : 0, i);
    }
  }
}

TEST(product_with_a_scale_that_is_not_a_number) {
  check_nan<float>();
  check_nan<Bf16>();
  check_nan<Fp16>();
}

}  // namespace
