// Kernels whose bytes must not depend on the instruction set, against the plain ones: optimizers and activations.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/state_code.h"
#include "cpu/kernels/kernels.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

constexpr int64_t kCounts[] = {1, 3, 4, 15, 16, 17, 31, 255, 256, 257, 1000};

// Mostly moderate, some tiny, some so large that their squares overflow.
template <typename T>
std::vector<T> spread_values(oracle::Random& random, int64_t count, double largest) {
  std::vector<T> made;
  for (int64_t i = 0; i < count; ++i) {
    const float x = random.uniform();
    const int kind = random.byte() % 16;
    const double power = kind == 0 ? std::pow(2.0, -140 + random.byte() % 120) : kind == 1 ? largest : 1.0;
    made.push_back(from_float<T>(static_cast<float>(static_cast<double>(x) * power)));
  }
  return made;
}

template <typename T>
void check_same(const std::vector<T>& got, const std::vector<T>& expected, const char* what, int64_t count) {
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(std::memcmp(&got[i], &expected[i], sizeof(T)) == 0, "%s: element %zu of %ld differs", what, i,
          static_cast<long>(count));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizers

template <typename T>
struct Trained {
  std::vector<T> param;
  std::vector<unsigned char> first, second;
  std::vector<float> first_absmax, second_absmax;
  double squares = 0.0;
};

template <typename T>
Trained<T> train(const cpu::OptimKernels& kernels, int64_t count, bool coded, float coupled, double largest) {
  constexpr auto kIndex = static_cast<int>(oracle::Storage<T>::kDtype);
  oracle::Random random(static_cast<uint64_t>(count));
  const int64_t blocks = (count + kStateBlock - 1) / kStateBlock;
  const auto state_bytes = static_cast<size_t>(coded ? count : 4 * count);
  const auto scales = static_cast<size_t>(coded ? blocks : 0);
  Trained<T> of{spread_values<T>(random, count, 1.0),
                std::vector<unsigned char>(state_bytes),
                std::vector<unsigned char>(state_bytes),
                std::vector<float>(scales),
                std::vector<float>(scales),
                0.0};
  for (int step = 1; step <= 3; ++step) {
    const std::vector<T> grad = spread_values<T>(random, count, largest);
    const float corrected = 1.0f / std::sqrt(1.0f - std::pow(0.99f, static_cast<float>(step)));
    kernels.adamw_blocks[kIndex]({of.param.data(),
                                  grad.data(),
                                  of.first.data(),
                                  of.second.data(),
                                  coded ? of.first_absmax.data() : nullptr,
                                  coded ? of.second_absmax.data() : nullptr,
                                  count,
                                  {0.7f, 0.999f, coupled, 0.9f, 0.1f, 0.99f, 0.01f, corrected, 1e-8f, 1e-2f}},
                                 0, blocks);
    kernels.lion_blocks[kIndex]({of.param.data(),
                                 grad.data(),
                                 of.first.data(),
                                 coded ? of.first_absmax.data() : nullptr,
                                 count,
                                 {0.7f, 0.999f, 1e-3f, 0.9f, 0.1f, 0.99f, 0.01f}},
                                0, blocks);
    of.squares += kernels.sum_of_squares[kIndex](grad.data(), count);
  }
  return of;
}

template <typename T>
void check_optimizers() {
  for (const int64_t count : kCounts) {
    for (const bool coded : {false, true}) {
      for (const float coupled : {0.0f, 0.1f}) {
        for (const double largest : {1.0, 1e30}) {
          const double within = sizeof(T) == 2 && largest > 1.0 ? 1e4 : largest;  // finite in half precision
          const auto got = train<T>(cpu::kernels().optim, count, coded, coupled, within);
          const auto expected = train<T>(cpu::scalar_kernels().optim, count, coded, coupled, within);
          check_same(got.param, expected.param, "param", count);
          check_same(got.first, expected.first, "first moment", count);
          check_same(got.second, expected.second, "second moment", count);
          check_same(got.first_absmax, expected.first_absmax, "absmax of the first moment", count);
          check_same(got.second_absmax, expected.second_absmax, "absmax of the second moment", count);
          CHECK(got.squares == expected.squares, "sum of squares: %a, expected %a", got.squares, expected.squares);
        }
      }
    }
  }
}

TEST(optimizers_of_fp32_give_the_plain_bytes) { check_optimizers<float>(); }
TEST(optimizers_of_bf16_give_the_plain_bytes) { check_optimizers<Bf16>(); }
TEST(optimizers_of_fp16_give_the_plain_bytes) { check_optimizers<Fp16>(); }

// ---------------------------------------------------------------------------------------------------------------------
// Activations

template <typename T>
struct Activated {
  std::vector<T> normal, grad_normal, gated, grad_gate, grad_up, turned, returned, softmax;
  std::vector<float> sums;
};

template <typename T>
Activated<T> activate(const cpu::ActivationKernels& kernels, int64_t count) {
  constexpr auto kIndex = static_cast<int>(oracle::Storage<T>::kDtype);
  oracle::Random random(static_cast<uint64_t>(count));
  const std::vector<T> x = spread_values<T>(random, 2 * count, 90.0);
  const std::vector<T> y = spread_values<T>(random, 2 * count, 90.0);
  const std::vector<T> z = spread_values<T>(random, 2 * count, 90.0);
  const std::vector<T> empty(x.size());
  Activated<T> of{empty, empty, empty, empty, empty, empty, empty, x, std::vector<float>(2)};
  kernels.rms_norm_rows[kIndex]({x.data(), y.data(), count, 1e-5f, of.normal.data(), of.sums.data()}, 0, 2);
  kernels.rms_norm_grad_rows[kIndex]({z.data(), x.data(), y.data(), of.sums.data(), count, of.grad_normal.data()}, 0,
                                     2);
  kernels.swiglu_span[kIndex]({x.data(), y.data(), of.gated.data()}, 0, 2 * count);
  kernels.swiglu_grad_span[kIndex]({z.data(), x.data(), y.data(), of.grad_gate.data(), of.grad_up.data()}, 0,
                                   2 * count);
  RotaryJob job{x.data(), {0, 0, 0}, y.data(), z.data(), 0, 1, 1, 1, 2 * count, false, of.turned.data(), {0, 0, 0}};
  kernels.rotary_positions[kIndex](job, 0, 1);
  job.inverse = true;
  job.y = of.returned.data();
  kernels.rotary_positions[kIndex](job, 0, 1);
  const cpu::SoftmaxRow row = kernels.softmax_row[kIndex](of.softmax.data(), 2 * count, count / 2, true);
  of.sums.insert(of.sums.end(), {row.top, row.sum, row.chosen});
  return of;
}

template <typename T>
void check_activations() {
  for (const int64_t count : kCounts) {
    const auto got = activate<T>(cpu::kernels().activations, count);
    const auto expected = activate<T>(cpu::scalar_kernels().activations, count);
    check_same(got.normal, expected.normal, "rms_norm", count);
    check_same(got.grad_normal, expected.grad_normal, "gradient of rms_norm", count);
    check_same(got.gated, expected.gated, "swiglu", count);
    check_same(got.grad_gate, expected.grad_gate, "gradient of the gate", count);
    check_same(got.grad_up, expected.grad_up, "gradient of up", count);
    check_same(got.turned, expected.turned, "rotary", count);
    check_same(got.returned, expected.returned, "inverse rotary", count);
    check_same(got.softmax, expected.softmax, "softmax", count);
    check_same(got.sums, expected.sums, "sums", count);
  }
}

TEST(activations_of_fp32_give_the_plain_bytes) { check_activations<float>(); }
TEST(activations_of_bf16_give_the_plain_bytes) { check_activations<Bf16>(); }
TEST(activations_of_fp16_give_the_plain_bytes) { check_activations<Fp16>(); }

}  // namespace
