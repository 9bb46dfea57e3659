#include "check.h"
#include "core/layout.h"
#include "cpu/linear_4bit.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

// y [m, n] against x w^T + addend in double precision, with w [n, k]; errors are taken relative to the terms' sizes.
template <typename T, typename Addend, typename W>
void check_sums(const std::vector<T>& x, const std::vector<T>& y, int64_t m, int64_t n, int64_t k, double tolerance,
                const Addend& addend, const W& w) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double expected = addend(j);
      double magnitude = std::fabs(expected) + 1e-30;
      for (int64_t l = 0; l < k; ++l) {
        const double product = oracle::value_of(x[static_cast<size_t>(i * k + l)]) * w(j * k + l);
        expected += product;
        magnitude += std::fabs(product);
      }
      const double got = oracle::value_of(y[static_cast<size_t>(i * n + j)]);
      CHECK(std::fabs(got - expected) <= tolerance * magnitude, "m %ld n %ld k %ld: [%ld, %ld] is %a, expected %a",
            static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), static_cast<long>(i),
            static_cast<long>(j), got, expected);
    }
  }
}

// Buffers of the exact size, so that a sanitizer sees every step beyond them.
template <typename T>
void check_product(int64_t m, int64_t n, int64_t k, double tolerance, int64_t block_size = 64, bool nested = true) {
  const oracle::RandomWeight weight(n * k, block_size, nested, QuantType::kNf4, static_cast<uint64_t>(n + k));
  oracle::Random random(static_cast<uint64_t>(m));
  const std::vector<T> x = oracle::uniform_values<T>(random, m * k);
  const std::vector<T> bias = oracle::uniform_values<T>(random, n);
  for (const bool with_bias : {false, true}) {
    std::vector<T> y(static_cast<size_t>(m * n));
    cpu::GemmCall call{};
    call.job.weight = weight.view;
    call.job.dtype = oracle::Storage<T>::kDtype;
    call.job.forward = true;
    call.job.x = x.data();
    call.job.bias = with_bias ? bias.data() : nullptr;
    call.job.y = y.data();
    call.job.m = m;
    call.job.n = n;
    call.job.k = k;
    const oracle::Scratch scratch(cpu::linear_4bit_scratch_bytes(call));
    cpu::linear_4bit(call, scratch.aligned);
    const auto addend = [&](int64_t j) { return with_bias ? oracle::value_of(bias[static_cast<size_t>(j)]) : 0.0; };
    check_sums(x, y, m, n, k, tolerance, addend, [&weight](int64_t element) {
      return oracle::dequantised(weight.view, element, oracle::Storage<T>::kFormat);
    });
  }
}

template <typename T>
void check_products(double tolerance) {
  for (int64_t m = 0; m <= 9; ++m) {
    check_product<T>(m, 5, 67, tolerance);
  }
  for (const int64_t k : {1, 31, 32, 33, 64, 129, 2047, 2048, 2049, 4133}) {
    check_product<T>(3, 3, k, tolerance);
  }
  check_product<T>(2, 1, 64, tolerance);
  check_product<T>(2, 200, 96, tolerance);
  for (int64_t m = 1; m <= 5; ++m) {
    check_product<T>(m, 70, 192, tolerance);
  }
  for (const int64_t m : {1, 2, 4}) {  // several loads of scales, which end within a row's blocks and within a group
    check_product<T>(m, 260, 576, tolerance);
    check_product<T>(m, 13, 16384, tolerance);
    check_product<T>(m, 36, 512, tolerance, 64, false);
    check_product<T>(m, 36, 512, tolerance, 128, true);
    check_product<T>(m, 12, 1536, tolerance, 512, false);
  }
}

template <typename T>
void check_dense_rows(int64_t m, int64_t n, int64_t k, double tolerance) {
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
  check_sums(
      x, y, m, n, k, tolerance, [](int64_t) { return 0.0; },
      [&w](int64_t element) { return oracle::value_of(w[static_cast<size_t>(element)]); });
}

template <typename T>
void check_few_dense(double tolerance) {
  for (int64_t m = 0; m <= 3; ++m) {
    check_dense_rows<T>(m, 5, 67, tolerance);
  }
  for (const int64_t k : {1, 8, 31, 64, 128, 129, 576, 2049}) {
    check_dense_rows<T>(2, 7, k, tolerance);
  }
  check_dense_rows<T>(1, 700, 256, tolerance);  // more than one thread
}

TEST(dense_rows) {
  check_few_dense<float>(1e-6);
  check_few_dense<Bf16>(0x1p-8);
  check_few_dense<Fp16>(0x1p-10);
}

TEST(linear_fp32) { check_products<float>(1e-6); }
TEST(linear_bf16) { check_products<Bf16>(0x1p-8); }
TEST(linear_fp16) { check_products<Fp16>(0x1p-10); }

}  // namespace
