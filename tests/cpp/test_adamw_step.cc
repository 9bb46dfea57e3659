#include <cmath>
#include <cstring>
#include <vector>

#include "caller_state.h"
#include "check.h"
#include "core/arithmetic.h"
#include "cpu/adamw_step.h"
#include "cpu/gradient_norm.h"
#include "cpu/lion_step.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

// Tensors of the exact sizes, so that a sanitizer sees every step beyond them.
struct Tensors {
  explicit Tensors(std::vector<int64_t> sizes, bool coded) {
    oracle::Random random(7);
    for (const int64_t numel : sizes) {
      const auto n = static_cast<size_t>(numel);
      const auto blocks = static_cast<size_t>((numel + kStateBlock - 1) / kStateBlock);
      Buffers& of = buffers.emplace_back();
      for (size_t i = 0; i < n; ++i) {
        of.param.push_back(random.uniform());
        of.grad.push_back(random.uniform() * random.uniform());
      }
      of.exp_avg.resize(coded ? n : 4 * n);
      of.exp_avg_sq.resize(coded ? n : 4 * n);
      of.absmax.resize(coded ? 2 * blocks : 0);
    }
    for (Buffers& of : buffers) {
      const auto numel = static_cast<int64_t>(of.param.size());
      float* absmax = coded ? of.absmax.data() : nullptr;
      list.push_back({of.param.data(), of.grad.data(), of.exp_avg.data(), of.exp_avg_sq.data(), absmax,
                      coded ? absmax + of.absmax.size() / 2 : nullptr, &of.step, numel, Dtype::kFloat32, 0});
    }
  }

  bool operator==(const Tensors& other) const {
    for (size_t i = 0; i < buffers.size(); ++i) {
      const Buffers& a = buffers[i];
      const Buffers& b = other.buffers[i];
      if (a.param != b.param || a.exp_avg != b.exp_avg || a.exp_avg_sq != b.exp_avg_sq || a.absmax != b.absmax ||
          a.step != b.step) {
        return false;
      }
    }
    return true;
  }

  struct Buffers {
    std::vector<float> param, grad;
    std::vector<unsigned char> exp_avg, exp_avg_sq;
    std::vector<float> absmax;
    float step = 0.0f;
  };
  std::vector<Buffers> buffers;
  std::vector<OptimTensor> list;

  int64_t count() const { return static_cast<int64_t>(list.size()); }
};

const std::vector<int64_t> kSizes = {1, 15, 16, 17, 255, 256, 257, 1000, 0, 20000};
const AdamwOptions kAdamw = {1e-2, 0.9, 0.99, 1e-8, 0.1, true};
const LionOptions kLion = {1e-2, 0.9, 0.99, 0.1};

TEST(adamw_32_bit_follows_double_precision) {
  Tensors tensors(kSizes, false);
  Tensors start(kSizes, false);
  constexpr int kSteps = 5;
  constexpr double kFactor = 0.5;
  for (int i = 0; i < kSteps; ++i) {
    cpu::adamw_step(tensors.list.data(), tensors.count(), &kAdamw, kFactor);
  }
  for (size_t t = 0; t < start.buffers.size(); ++t) {
    for (size_t i = 0; i < start.buffers[t].param.size(); ++i) {
      double p = static_cast<double>(start.buffers[t].param[i]);
      const double g = static_cast<double>(start.buffers[t].grad[i]) * kFactor;
      double m = 0.0;
      double v = 0.0;
      for (int s = 1; s <= kSteps; ++s) {
        p *= 1.0 - kAdamw.lr * kAdamw.weight_decay;
        m = kAdamw.beta1 * m + (1.0 - kAdamw.beta1) * g;
        v = kAdamw.beta2 * v + (1.0 - kAdamw.beta2) * g * g;
        const double corrected = std::sqrt(v / (1.0 - std::pow(kAdamw.beta2, s)));
        p -= kAdamw.lr * m / (1.0 - std::pow(kAdamw.beta1, s)) / (corrected + kAdamw.eps);
      }
      const double got = static_cast<double>(tensors.buffers[t].param[i]);
      CHECK(std::fabs(got - p) < 1e-6, "tensor %zu, element %zu: %a, expected %a", t, i, got, p);
    }
  }
}

// One element after another by the rule of core/state_code.h, for a block of the second moment alone.
TEST(adamw_8_bit_encodes_by_the_rule) {
  Tensors tensors({300}, true);
  const std::vector<float> grad = tensors.buffers[0].grad;
  cpu::adamw_step(tensors.list.data(), 1, &kAdamw, 1.0);
  for (int64_t block = 0; block < 2; ++block) {
    const int64_t end = std::min<int64_t>(300, (block + 1) * kStateBlock);
    const auto second = [&](int64_t i) {
      const float g = grad[static_cast<size_t>(i)];
      return g * static_cast<float>(1.0 - kAdamw.beta2) * g;
    };
    float highest = 0.0f;
    for (int64_t i = block * kStateBlock; i < end; ++i) {
      highest = std::max(highest, second(i));
    }
    CHECK(tensors.list[0].exp_avg_sq_absmax[block] == highest, "absmax of block %ld", static_cast<long>(block));
    for (int64_t i = block * kStateBlock; i < end; ++i) {
      const uint8_t expected = encode_unsigned(kUnsignedState, normalizer_of(highest)(second(i)));
      const uint8_t got = tensors.buffers[0].exp_avg_sq[static_cast<size_t>(i)];
      CHECK(got == expected, "element %ld: %d, expected %d", static_cast<long>(i), got, expected);
    }
  }
}

TEST(optimizers_do_not_depend_on_threads_or_flush_flags) {
  for (const bool coded : {false, true}) {
    const auto run = [&](int threads) {
      const Threads set(threads);
      Tensors tensors(kSizes, coded);
      for (Tensors::Buffers& of : tensors.buffers) {
        for (float& g : of.grad) {
          g *= 1e-20f;  // second moments are then subnormal
        }
      }
      const double norm = cpu::gradient_norm(tensors.list.data(), tensors.count());
      cpu::adamw_step(tensors.list.data(), tensors.count(), &kAdamw, 1.0);
      cpu::lion_step(tensors.list.data(), tensors.count(), &kLion, norm);
      tensors.buffers[0].absmax.push_back(static_cast<float>(norm));
      return tensors;
    };
    const Tensors expected = run(1);
    for (const int threads : {2, 3, 7}) {
      CHECK(run(threads) == expected, "%d threads, coded %d", threads, coded);
    }
    const FlushesSubnormals flushes;
    CHECK(run(2) == expected, "flushing, coded %d", coded);
    CHECK(flushes.still(), "the caller's flags were changed");
  }
}

TEST(lion_moves_by_the_sign) {
  Tensors tensors({300}, false);
  const Tensors start({300}, false);
  cpu::lion_step(tensors.list.data(), 1, &kLion, 1.0);
  for (size_t i = 0; i < 300; ++i) {
    const double p = static_cast<double>(start.buffers[0].param[i]);
    const double g = static_cast<double>(start.buffers[0].grad[i]);
    const double sign = g > 0.0 ? 1.0 : g < 0.0 ? -1.0 : 0.0;
    const double expected = p * (1.0 - kLion.lr * kLion.weight_decay) - kLion.lr * sign;
    CHECK(std::fabs(static_cast<double>(tensors.buffers[0].param[i]) - expected) < 2e-7, "element %zu", i);
  }
}

TEST(gradient_norm_is_finite_if_all_elements_are) {
  Tensors tensors({40000, 3}, false);
  float& last = tensors.buffers[0].grad.back();
  last = 3e38f;
  CHECK(std::isfinite(cpu::gradient_norm(tensors.list.data(), 2)), "the square of a large element overflowed");
  last = INFINITY;
  CHECK(!std::isfinite(cpu::gradient_norm(tensors.list.data(), 2)), "infinity was lost");
  last = NAN;
  CHECK(!std::isfinite(cpu::gradient_norm(tensors.list.data(), 2)), "NaN was lost");
  CHECK(cpu::gradient_norm(tensors.list.data(), 0) == 0.0, "no tensors");
}

}  // namespace
