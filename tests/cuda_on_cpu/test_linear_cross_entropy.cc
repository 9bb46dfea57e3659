// The shipped kernel against the same in double precision, and near the CPU op.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpp/oracle.h"
#include "cpu/linear_cross_entropy.h"
#include "cuda/linear_cross_entropy.cuh"
#include "cuda/linear_cross_entropy.h"
#include "cuda_on_cpu/harness.h"
#include "cuda_on_cpu/launch.h"

using namespace qlora_native;

namespace {

constexpr int64_t kIgnored = -100;

template <typename T>
struct Rows {
  Rows(int64_t count, int64_t width, float spread, uint64_t seed)
      : rows(count), vocabulary(width), losses(static_cast<size_t>(count)) {
    oracle::Random random(seed);
    for (int64_t i = 0; i < rows * vocabulary; ++i) {
      logits.push_back(from_float<T>(spread * random.uniform()));
    }
    for (int64_t i = 0; i < rows; ++i) {
      targets.push_back(i == 0 ? 0 : i == 1 ? vocabulary - 1 : static_cast<int64_t>(random.bits()) % vocabulary);
    }
  }

  int64_t rows;
  int64_t vocabulary;
  std::vector<T> logits;
  std::vector<int64_t> targets;
  std::vector<float> losses;
};

// grid: thread blocks, of which the kernel is then launched directly; 0: by the launcher.
template <typename T>
Rows<T> on_device(Rows<T> of, bool need_gradient, size_t offset = 0, unsigned grid = 0) {
  const cuemu::DeviceBuffer<T> logits(of.logits, offset);
  const cuemu::DeviceBuffer<int64_t> targets(of.targets);
  const cuemu::DeviceBuffer<float> losses(of.losses.size());
  if (grid == 0) {
    CHECK_LAUNCH(cuda::launch_softmax_loss(oracle::Storage<T>::kDtype, logits.data(), targets.data(), kIgnored, of.rows,
                                           of.vocabulary, need_gradient, losses.data(), nullptr));
  } else {
    CHECK_LAUNCH(wp::launch(cuda::softmax_loss_kernel<T, cuda::kSoftmaxThreads>, dim3(grid),
                            dim3(cuda::kSoftmaxThreads), 0, nullptr, logits.data(), targets.data(), kIgnored, of.rows,
                            of.vocabulary, false, need_gradient, losses.data()));
  }
  of.logits = logits.host();
  of.losses = losses.host();
  return of;
}

template <typename T>
void check_near(const Rows<T>& start, const Rows<T>& got, bool has_gradient, const std::string& what) {
  const double step = std::ldexp(1.0, -oracle::Storage<T>::kFormat.mantissa_bits - 1);  // of rounding to T
  for (int64_t row = 0; row < start.rows; ++row) {
    const T* x = start.logits.data() + row * start.vocabulary;
    const T* y = got.logits.data() + row * start.vocabulary;
    double top = oracle::value_of(x[0]);
    double sum = 0.0;
    for (int64_t i = 0; i < start.vocabulary; ++i) {
      top = std::max(top, oracle::value_of(x[i]));
    }
    for (int64_t i = 0; i < start.vocabulary; ++i) {
      sum += std::exp(oracle::value_of(x[i]) - top);
    }
    const int64_t target = start.targets[static_cast<size_t>(row)];
    const double loss = std::log(sum) + top - oracle::value_of(x[target]);
    const double got_loss = static_cast<double>(got.losses[static_cast<size_t>(row)]);
    CHECK(std::fabs(got_loss - loss) <= 1e-5 * (1.0 + std::fabs(loss)), "%s: row %lld: the loss is %g, expected %g",
          what.c_str(), static_cast<long long>(row), got_loss, loss);
    for (int64_t i = 0; i < start.vocabulary; ++i) {
      const double probability = std::exp(oracle::value_of(x[i]) - top) / sum;
      const double expected = has_gradient ? probability - (i == target ? 1.0 : 0.0) : oracle::value_of(x[i]);
      const double bound = has_gradient ? 1e-5 * probability + 1.01 * step * std::fabs(expected) + 6e-8 : 0.0;
      CHECK(std::fabs(oracle::value_of(y[i]) - expected) <= bound, "%s: row %lld, word %lld: %g, expected %g",
            what.c_str(), static_cast<long long>(row), static_cast<long long>(i), oracle::value_of(y[i]), expected);
    }
  }
}

template <typename T>
void check_sizes() {
  for (const int64_t vocabulary : {1, 7, 512, 4096, 5003}) {
    for (const bool need_gradient : {false, true}) {
      const Rows<T> start(3, vocabulary, 20.0f, static_cast<uint64_t>(vocabulary));
      const std::string what = "vocabulary " + std::to_string(vocabulary);
      cuemu::over_all_schedules(
          [&](const char*) { check_near(start, on_device(start, need_gradient), need_gradient, what); });
    }
  }
}

TEST(softmax_loss_fp32) { check_sizes<float>(); }
TEST(softmax_loss_bf16) { check_sizes<Bf16>(); }
TEST(softmax_loss_fp16) { check_sizes<Fp16>(); }

TEST(softmax_loss_unaligned_and_striding) {
  const Rows<Bf16> start(7, 1000, 5.0f, 1);
  cuemu::over_all_schedules([&](const char*) {
    check_near(start, on_device(start, true, 2), true, "one element past a vector");
    check_near(start, on_device(start, true, 0, 2), true, "two thread blocks");
  });
}

// One logit far above the others, the largest one last, all of them equal; and the loss of the CPU op.
TEST(softmax_loss_of_extremes) {
  Rows<float> start(4, 3000, 1.0f, 2);
  for (size_t i = 0; i < 3000; ++i) {
    start.logits[i] = i == 5 ? 1e4f : -1e4f;
    start.logits[3000 + i] = static_cast<float>(i);
    start.logits[6000 + i] = 7.0f;
  }
  const Rows<float> got = on_device(start, true);
  check_near(start, got, true, "extremes");
  Rows<float> cpu = start;
  cpu::softmax_loss(Dtype::kFloat32, cpu.logits.data(), cpu.targets.data(), 4, 3000, true, cpu.losses.data());
  for (size_t row = 0; row < 4; ++row) {
    CHECK(std::fabs(got.losses[row] - cpu.losses[row]) <= 1e-5f * (1.0f + std::fabs(cpu.losses[row])), "row %zu", row);
  }
}

// Targets to ignore and targets that are no word, beside rows whose results they do not touch.
template <typename T>
void check_targets_without_a_word() {
  for (const int64_t vocabulary : {7, 4096, 5003}) {
    for (const bool need_gradient : {false, true}) {
      const Rows<T> start(5, vocabulary, 5.0f, 3);
      Rows<T> changed = start;
      const std::vector<int64_t> targets{kIgnored, vocabulary, -1, int64_t{1} << 40};
      std::copy(targets.begin(), targets.end(), changed.targets.begin());
      cuemu::over_all_schedules([&](const char* schedule) {
        const Rows<T> got = on_device(changed, need_gradient);
        const Rows<T> usual = on_device(start, need_gradient);
        CHECK(got.losses[4] == usual.losses[4], "%s: the row that has a word", schedule);
        for (size_t row = 0; row < 4; ++row) {
          const bool loss_is_right = row == 0 ? got.losses[row] == 0.0f : std::isnan(got.losses[row]);
          CHECK(loss_is_right, "%s: row %zu: the loss is %g", schedule, row, static_cast<double>(got.losses[row]));
        }
        for (size_t i = 0; i < got.logits.size(); ++i) {
          const size_t row = i / static_cast<size_t>(vocabulary);
          const double value = oracle::value_of(got.logits[i]);
          const double same = oracle::value_of((need_gradient && row == 4 ? usual : start).logits[i]);
          const bool is_right = !need_gradient || row == 4 ? value == same
                                : row == 0                 ? value == 0.0
                                                           : std::isnan(value);
          CHECK(is_right, "%s: element %zu is %g", schedule, i, value);
        }
      });
    }
  }
}

TEST(softmax_loss_of_targets_without_a_word) {
  check_targets_without_a_word<float>();
  check_targets_without_a_word<Bf16>();
  check_targets_without_a_word<Fp16>();
}

TEST(softmax_loss_of_no_rows_launches_nothing) {
  cuemu::take_launches();
  CHECK_LAUNCH(cuda::launch_softmax_loss(Dtype::kFloat32, nullptr, nullptr, kIgnored, 0, 100, true, nullptr, nullptr));
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
