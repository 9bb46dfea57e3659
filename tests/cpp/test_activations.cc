// The kernels between the products against double precision, in buffers of the exact size, so that a sanitizer sees
// every step beyond them.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/rms_norm.h"
#include "cpu/rotary.h"
#include "cpu/swiglu.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

void check_close(double got, double expected, double tolerance, const char* what, int64_t at) {
  CHECK(std::fabs(got - expected) <= tolerance * (std::fabs(expected) + 1e-3), "%s [%ld] is %a, expected %a", what,
        static_cast<long>(at), got, expected);
}

template <typename T>
void check_rms_norm(int64_t rows, int64_t width, double tolerance) {
  oracle::Random random(static_cast<uint64_t>(width));
  const std::vector<T> x = oracle::uniform_values<T>(random, rows * width, 3.0f);
  const std::vector<T> weight = oracle::uniform_values<T>(random, width, 3.0f);
  const std::vector<T> grad_y = oracle::uniform_values<T>(random, rows * width, 3.0f);
  std::vector<T> y(x.size());
  std::vector<T> grad_x(x.size());
  std::vector<float> rstd(static_cast<size_t>(rows));
  constexpr auto kDtype = oracle::Storage<T>::kDtype;
  cpu::rms_norm({x.data(), weight.data(), width, 1e-5f, y.data(), rstd.data()}, rows, kDtype);
  cpu::rms_norm_backward({grad_y.data(), x.data(), weight.data(), rstd.data(), width, grad_x.data()}, rows, kDtype);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      squares += oracle::value_at(x, row * width + i) * oracle::value_at(x, row * width + i);
    }
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + 1e-5);
    double mean = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row * width + i;
      mean += oracle::value_at(grad_y, at) * oracle::value_at(weight, i) * oracle::value_at(x, at) * scale /
              static_cast<double>(width);
    }
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row * width + i;
      const double normal = oracle::value_at(x, at) * scale;
      check_close(oracle::value_at(y, at), oracle::value_at(weight, i) * normal, tolerance, "y", at);
      const double gradient = scale * (oracle::value_at(grad_y, at) * oracle::value_at(weight, i) - normal * mean);
      CHECK(std::fabs(oracle::value_at(grad_x, at) - gradient) <= tolerance * 8, "grad_x [%ld] is %a, expected %a",
            static_cast<long>(at), oracle::value_at(grad_x, at), gradient);
    }
  }
}

template <typename T>
void check_elementwise(int64_t count, double tolerance) {
  oracle::Random random(static_cast<uint64_t>(count));
  const std::vector<T> gate = oracle::uniform_values<T>(random, count, 3.0f);
  const std::vector<T> up = oracle::uniform_values<T>(random, count, 3.0f);
  const std::vector<T> grad_y = oracle::uniform_values<T>(random, count, 3.0f);
  std::vector<T> y(gate.size());
  std::vector<T> grad_gate(gate.size());
  std::vector<T> grad_up(gate.size());
  constexpr auto kDtype = oracle::Storage<T>::kDtype;
  cpu::swiglu({gate.data(), up.data(), y.data()}, count, kDtype);
  cpu::swiglu_backward({grad_y.data(), gate.data(), up.data(), grad_gate.data(), grad_up.data()}, count, kDtype);
  for (int64_t i = 0; i < count; ++i) {
    const double g = oracle::value_at(gate, i);
    const double s = 1.0 / (1.0 + std::exp(-g));
    check_close(oracle::value_at(y, i), g * s * oracle::value_at(up, i), tolerance, "y", i);
    check_close(oracle::value_at(grad_up, i), oracle::value_at(grad_y, i) * g * s, tolerance, "grad_up", i);
    const double gradient =
        oracle::value_at(grad_y, i) * oracle::value_at(up, i) * s * (1.0 + g * (1.0 - s));  // crosses zero
    CHECK(std::fabs(oracle::value_at(grad_gate, i) - gradient) <= tolerance * (std::fabs(gradient) + 1.0),
          "grad_gate [%ld] is %a, expected %a", static_cast<long>(i), oracle::value_at(grad_gate, i), gradient);
  }
}

template <typename T>
void check_softmax(int64_t rows, int64_t vocabulary, double tolerance) {
  oracle::Random random(static_cast<uint64_t>(vocabulary));
  std::vector<T> logits = oracle::uniform_values<T>(random, rows * vocabulary, 3.0f);
  const std::vector<T> before = logits;
  std::vector<float> losses(static_cast<size_t>(rows));
  std::vector<int64_t> targets;
  for (int64_t row = 0; row < rows; ++row) {
    targets.push_back((row * 7) % vocabulary);
  }
  cpu::softmax_loss(oracle::Storage<T>::kDtype, logits.data(), targets.data(), rows, vocabulary, true, losses.data());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = targets[static_cast<size_t>(row)];
    double sum = 0.0;
    for (int64_t i = 0; i < vocabulary; ++i) {
      sum += std::exp(oracle::value_at(before, row * vocabulary + i));
    }
    check_close(losses[static_cast<size_t>(row)], std::log(sum) - oracle::value_at(before, row * vocabulary + target),
                1e-6, "loss", row);
    for (int64_t i = 0; i < vocabulary; ++i) {
      const int64_t at = row * vocabulary + i;
      check_close(oracle::value_at(logits, at),
                  std::exp(oracle::value_at(before, at)) / sum - (i == target ? 1.0 : 0.0), tolerance, "gradient", at);
    }
  }
}

template <typename T>
void check_all(double tolerance) {
  for (const int64_t width : {1, 15, 16, 17, 48, 65, 577}) {
    check_rms_norm<T>(5, width, tolerance);
    check_elementwise<T>(width, tolerance);
    check_softmax<T>(3, width, tolerance);
  }
  check_elementwise<T>(40'001, tolerance);  // more than one task
}

TEST(activations_fp32) { check_all<float>(2e-6); }
TEST(activations_bf16) { check_all<Bf16>(0x1p-7); }
TEST(activations_fp16) { check_all<Fp16>(0x1p-9); }

TEST(rotary_turns_and_returns) {
  constexpr int64_t kLength = 3;
  constexpr int64_t kWidth = 22;
  oracle::Random random(1);
  const std::vector<float> x = oracle::uniform_values<float>(random, 2 * kLength * 2 * kWidth, 3.0f);
  std::vector<float> cosine;
  std::vector<float> sine;
  for (int64_t position = 0; position < kLength; ++position) {
    for (int64_t i = 0; i < kWidth; ++i) {
      const double angle = static_cast<double>(position + 1) * static_cast<double>(i % (kWidth / 2) + 1);
      cosine.push_back(static_cast<float>(std::cos(angle)));
      sine.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  std::vector<float> turned(x.size());
  std::vector<float> returned(x.size());
  RotaryJob job{x.data(),
                {kLength * 2 * kWidth, kWidth, 2 * kWidth},
                cosine.data(),
                sine.data(),
                0,
                2,
                2,
                kLength,
                kWidth,
                false,
                turned.data(),
                {kLength * 2 * kWidth, kWidth, 2 * kWidth}};
  cpu::rotary(job, Dtype::kFloat32);
  job.x = turned.data();
  job.y = returned.data();
  job.inverse = true;
  cpu::rotary(job, Dtype::kFloat32);
  for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
    check_close(oracle::value_at(returned, i), oracle::value_at(x, i), 1e-5, "returned", i);
  }
}

}  // namespace
