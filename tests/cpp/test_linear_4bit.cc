#include <string>

#include "caller_state.h"
#include "check.h"
#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/linear_4bit.h"
#include "oracle.h"
#include "silicon.h"

using namespace qlora_native;

namespace {

// A sum of products in double precision, and how far from it a kernel may end.
struct Sum {
  double value = 0.0;
  double magnitude = 0.0;  // of all terms together
  double squares = 0.0;

  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
    squares += term * term;
  }

  // The result is rounded once to T, and sums in fp32 err like the root of their length. 4-bit weights are rounded to
  // T, their levels or their scaled levels, by half a step each: errors of random sign, of which five deviations are
  // granted.
  template <typename T>
  double tolerance(int64_t depth, bool of_4bit_weights) const {
    constexpr oracle::Format kFormat = oracle::Storage<T>::kFormat;
    constexpr double kStep = 1.0 / static_cast<double>(int64_t{2} << kFormat.mantissa_bits);
    const double smallest = oracle::value_of(kFormat, 1) / 2.0;
    const double root = std::sqrt(static_cast<double>(depth));
    const double of_weights = 3.0 * (kStep * std::sqrt(squares) + smallest * root);
    return kStep * std::fabs(value) + smallest + 0x1p-24 * magnitude * (4.0 + root) +
           (of_4bit_weights ? of_weights : 0.0);
  }
};

struct Case {
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t block;
  bool nested;
  QuantType type;
  int64_t r;  // 0: no adapter
};

std::string text(const Case& c) {
  return "m " + std::to_string(c.m) + ", n " + std::to_string(c.n) + ", k " + std::to_string(c.k) + ", block " +
         std::to_string(c.block) + (c.nested ? ", nested" : "") + ", " + kBlockFormats[static_cast<int>(c.type)].name +
         ", r " + std::to_string(c.r);
}

// Operands of one product. Buffers are of the exact size, so that a sanitizer sees every step beyond them.
template <typename T>
struct Operands {
  explicit Operands(const Case& c)
      : weight(c.n * c.k, c.block, c.nested, c.type, static_cast<uint64_t>(c.n + c.k)),
        random(static_cast<uint64_t>(c.m)),
        x(oracle::uniform_values<T>(random, c.m * c.k)),
        bias(oracle::uniform_values<T>(random, c.n)),
        down(oracle::uniform_values<float>(random, c.r * c.k)),
        up(oracle::uniform_values<float>(random, c.n * c.r)),
        low(static_cast<size_t>(c.m * c.r)),
        y(static_cast<size_t>(c.m * c.n)) {
    call.job.weight = weight.view;
    call.job.dtype = oracle::Storage<T>::kDtype;
    call.job.forward = true;
    call.job.x = x.data();
    call.job.y = y.data();
    call.job.m = c.m;
    call.job.n = c.n;
    call.job.k = c.k;
    if (c.r > 0) {
      call.job.low = low.data();
      call.job.up = up.data();
      call.job.r = c.r;
      call.job.down = down.data();
      call.job.made_low = low.data();
      call.as_stored = true;
      call.up_scale = kUpScale;
    }
  }

  void run() {
    const oracle::Scratch scratch(cpu::linear_4bit_scratch_bytes(call));
    cpu::linear_4bit(call, scratch.aligned);
  }

  static constexpr float kUpScale = 0.75f;
  oracle::RandomWeight weight;
  oracle::Random random;
  std::vector<T> x;
  std::vector<T> bias;
  std::vector<float> down;
  std::vector<float> up;
  std::vector<T> low;
  std::vector<T> y;
  cpu::GemmCall call{};
};

template <typename T>
void check_product(const Case& c) {
  Operands<T> given(c);
  std::vector<double> w;
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    w.push_back(oracle::dequantized(given.weight.view, i, oracle::kFloat));
  }
  const std::vector<double> x = oracle::doubles_of(given.x);
  for (const bool with_bias : {false, true}) {
    given.call.job.bias = with_bias ? given.bias.data() : nullptr;
    given.run();
    silicon::add(given.low);
    silicon::add(given.y);
    const auto check = [&](const Sum& sum, double got, int64_t i, int64_t j, bool is_y) {
      CHECK(std::fabs(got - sum.value) <= sum.tolerance<T>(c.k, is_y), "%s: %s[%ld, %ld] is %a, expected %a",
            text(c).c_str(), is_y ? "y" : "low", static_cast<long>(i), static_cast<long>(j), got, sum.value);
    };
    for (int64_t i = 0; i < c.m; ++i) {
      const double* row = x.data() + i * c.k;
      for (int64_t j = 0; j < c.r; ++j) {
        Sum sum;
        for (int64_t l = 0; l < c.k; ++l) {
          sum.add(row[l] * static_cast<double>(given.down[static_cast<size_t>(j * c.k + l)]));
        }
        check(sum, oracle::value_of(given.low[static_cast<size_t>(i * c.r + j)]), i, j, false);
      }
      for (int64_t j = 0; j < c.n; ++j) {
        Sum sum;
        sum.add(with_bias ? oracle::value_of(given.bias[static_cast<size_t>(j)]) : 0.0);
        for (int64_t l = 0; l < c.k; ++l) {
          sum.add(row[l] * w[static_cast<size_t>(j * c.k + l)]);
        }
        for (int64_t l = 0; l < c.r; ++l) {
          sum.add(oracle::value_of(given.low[static_cast<size_t>(i * c.r + l)]) *
                  static_cast<double>(Operands<T>::kUpScale * given.up[static_cast<size_t>(j * c.r + l)]));
        }
        check(sum, oracle::value_of(given.y[static_cast<size_t>(i * c.n + j)]), i, j, true);
      }
    }
  }
}

// Columns in ranges, each cut where a thread's may be, give the bits of all at once.
template <typename T>
void check_cuts(const Case& c) {
  Operands<T> given(c);
  given.run();
  const cpu::RowKernels& rows = cpu::kernels().rows[static_cast<int>(given.call.job.dtype)];
  const oracle::Scratch scratch(rows.scratch_bytes(given.call.job));
  rows.reorder(given.call.job, scratch.aligned);
  const cpu::RowsJob job{given.call.job, given.up.data(), given.call.up_scale, scratch.aligned};
  const std::vector<T> whole = given.y;
  std::memset(given.y.data(), 0xff, given.y.size() * sizeof(T));
  for (int64_t first = 0, next = 0; first < c.n; first = next) {
    next = std::min(first + cpu::kStreamRows * (1 + first / cpu::kStreamRows % 3), c.n);
    rows.product(job, first, next);
  }
  CHECK(std::memcmp(whole.data(), given.y.data(), whole.size() * sizeof(T)) == 0,
        "%s: cut into ranges it gives other bits", text(c).c_str());
}

template <typename T>
void check_products() {
  constexpr QuantType kNf4 = QuantType::kNf4;
  constexpr QuantType kFp4 = QuantType::kFp4;
  const int64_t few = cpu::few_rows(oracle::Storage<T>::kDtype);
  for (int64_t m = 0; m <= 9; ++m) {
    const QuantType type = m % 2 == 0 ? kNf4 : kFp4;
    check_product<T>({m, 5, 67, 64, true, type, 0});
    for (const bool nested : {false, true}) {
      for (const int64_t block : {32, 64, 128, 256}) {
        for (const int64_t k : {192, 256, 320, 768}) {  // multiples of a chunk or of half of one, of the block or not
          check_product<T>({m, 13, k, block, nested, nested ? kNf4 : kFp4, 0});
        }
      }
    }
    if (m > 0 && m <= few) {
      for (const int64_t r : {1, 7, 16, 40}) {
        check_product<T>({m, 13, 320, 64, true, type, r});
        check_product<T>({m, 6, 99, 64, false, type, r});
      }
      check_cuts<T>({m, 39, 320, 64, true, type, 5});
    }
  }
  for (const int64_t k : {0, 1, 31, 32, 33, 64, 129, 2047, 2048, 2049, 4133}) {
    check_product<T>({3, 3, k, 64, true, kNf4, 0});
  }
  check_product<T>({2, 1, 64, 64, true, kFp4, 0});
  check_product<T>({2, 200, 96, 64, true, kNf4, 0});
  for (const int64_t m : {1, 2, 4}) {  // several loads of scales, which end within a row's blocks and within a group
    check_product<T>({m, 260, 576, 64, true, kFp4, 0});
    check_product<T>({m, 5, 16384, 64, true, kNf4, 0});
    check_product<T>({m, 4, 32832, 64, false, kNf4, 0});  // more blocks than a row may have
    check_product<T>({m, 12, 1536, 512, false, kNf4, 0});
    check_product<T>({m, 9, 8192, 4096, true, kFp4, 0});
  }
}

template <typename T>
void check_gguf() {
  const int64_t few = cpu::few_rows(oracle::Storage<T>::kDtype);
  for (const QuantType type : oracle::kGgufTypes) {
    const int64_t block = oracle::block_of(type);
    for (int64_t m = 1; m <= 9; ++m) {
      for (const int64_t k : {block, 3 * block, 10 * block}) {
        check_product<T>({m, 13, k, block, false, type, m <= few && m % 2 == 0 ? 5 : 0});
      }
    }
    check_cuts<T>({1, 39, 2 * block, block, false, type, 5});
    check_cuts<T>({few, 39, 256, block, false, type, 0});
    check_product<T>({2, 9, 2304, block, false, type, 0});
    check_product<T>({1, 6, 17152, block, false, type, 0});  // a long row
  }
  check_product<T>({2, 32, 77, 32, false, QuantType::kQ4_0, 0});  // rows that begin inside a block
  check_product<T>({1, 32, 77, 32, false, QuantType::kQ8_0, 3});
}

TEST(linear_on_any_number_of_threads) {
  const Case c{1, 515, 1024, 64, true, QuantType::kNf4, 16};
  Operands<Bf16> given(c);
  const auto on = [&given](int count) {
    const Threads threads(count);
    given.run();
    return given.y;
  };
  const std::vector<Bf16> alone = on(1);
  on(3);
  CHECK(std::memcmp(alone.data(), given.y.data(), alone.size() * sizeof(Bf16)) == 0, "other bits on %d threads", 3);
}

template <typename T>
void check_dense_rows(int64_t m, int64_t n, int64_t k) {
  oracle::Random random(static_cast<uint64_t>(n * k));
  const std::vector<T> x = oracle::uniform_values<T>(random, m * k);
  const std::vector<T> w = oracle::uniform_values<T>(random, n * k);
  std::vector<T> y(static_cast<size_t>(m * n));
  cpu::GemmCall call{};
  call.job.dtype = oracle::Storage<T>::kDtype;
  call.job.forward = true;
  call.job.x = x.data();
  call.job.dense = w.data();
  call.job.y = y.data();
  call.job.m = m;
  call.job.n = n;
  call.job.k = k;
  const oracle::Scratch scratch(cpu::linear_4bit_scratch_bytes(call));
  cpu::linear_4bit(call, scratch.aligned);
  silicon::add(y);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      for (int64_t l = 0; l < k; ++l) {
        sum.add(oracle::value_of(x[static_cast<size_t>(i * k + l)]) *
                oracle::value_of(w[static_cast<size_t>(j * k + l)]));
      }
      const double got = oracle::value_of(y[static_cast<size_t>(i * n + j)]);
      CHECK(std::fabs(got - sum.value) <= sum.tolerance<T>(k, false),
            "m %ld n %ld k %ld: [%ld, %ld] is %a, expected %a", static_cast<long>(m), static_cast<long>(n),
            static_cast<long>(k), static_cast<long>(i), static_cast<long>(j), got, sum.value);
    }
  }
}

template <typename T>
void check_few_dense() {
  for (int64_t m = 0; m <= 3; ++m) {
    check_dense_rows<T>(m, 5, 67);
  }
  for (const int64_t k : {0, 1, 8, 31, 64, 128, 129, 576, 2049}) {
    check_dense_rows<T>(2, 7, k);
  }
  check_dense_rows<T>(1, 700, 256);  // more than one thread
}

TEST(dense_rows) {
  check_few_dense<float>();
  check_few_dense<Bf16>();
  check_few_dense<Fp16>();
}

TEST(linear_fp32) { check_products<float>(); }
TEST(linear_bf16) { check_products<Bf16>(); }
TEST(linear_fp16) { check_products<Fp16>(); }
TEST(linear_gguf_fp32) { check_gguf<float>(); }
TEST(linear_gguf_bf16) { check_gguf<Bf16>(); }
TEST(linear_gguf_fp16) { check_gguf<Fp16>(); }

}  // namespace
