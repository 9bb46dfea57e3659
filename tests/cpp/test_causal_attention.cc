// Causal attention and its gradients against double precision, in buffers of the exact size, so that a sanitizer sees
// every step beyond them.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/causal_attention.h"
#include "oracle.h"
#include "silicon.h"

using namespace qlora_native;

namespace {

template <typename T>
struct Heads {
  std::vector<T> values;
  int64_t heads;
  int64_t length;
  int64_t width;

  cpu::HeadsView<void> view() { return {values.data(), length * heads * width, width, heads * width}; }
  cpu::HeadsView<const void> view() const { return {values.data(), length * heads * width, width, heads * width}; }
  double at(int64_t batch, int64_t head, int64_t row, int64_t d) const {
    return oracle::value_at(values, ((batch * length + row) * heads + head) * width + d);
  }
};

template <typename T>
Heads<T> random_heads(oracle::Random& random, int64_t batches, int64_t heads, int64_t length, int64_t width) {
  return {oracle::uniform_values<T>(random, batches * heads * length * width, 1.0f), heads, length, width};
}

// Output and gradients against the plain formulas in double precision. `rounding` is that of T.
template <typename T>
void check_attention(int64_t heads, int64_t kv_heads, int64_t length, int64_t width, double rounding) {
  constexpr int64_t kBatches = 2;
  constexpr auto kDtype = oracle::Storage<T>::kDtype;
  oracle::Random random(static_cast<uint64_t>(length));
  const float scale = 0.3f / std::sqrt(static_cast<float>(width));
  const Heads<T> q = random_heads<T>(random, kBatches, heads, length, width);
  const Heads<T> k = random_heads<T>(random, kBatches, kv_heads, length, width);
  const Heads<T> v = random_heads<T>(random, kBatches, kv_heads, length, width);
  const Heads<T> grad_out = random_heads<T>(random, kBatches, heads, length, width);
  Heads<T> out = grad_out;
  Heads<T> grad_q = q;
  Heads<T> grad_k = k;
  Heads<T> grad_v = v;
  std::vector<float> lse(static_cast<size_t>(kBatches * heads * length));
  cpu::AttentionJob job{kBatches, heads, kv_heads, length, width, scale};
  job.q = q.view();
  job.k = k.view();
  job.v = v.view();
  job.out = out.view();
  job.lse = lse.data();
  job.grad_out = grad_out.view();
  job.grad_q = grad_q.view();
  job.grad_k = grad_k.view();
  job.grad_v = grad_v.view();
  for (const bool backward : {false, true}) {
    const int64_t bytes = cpu::attention_scratch_bytes(kDtype, job, backward);
    std::vector<unsigned char> scratch(static_cast<size_t>(bytes + 64));
    unsigned char* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
    (backward ? cpu::causal_attention_backward : cpu::causal_attention)(kDtype, job, aligned);
  }
  for (const Heads<T>* made : {&out, &grad_q, &grad_k, &grad_v}) {
    silicon::add(made->values);
  }
  silicon::add(lse);
  const int64_t group = heads / kv_heads;
  const auto tolerance = [=](double magnitude) { return rounding * (4 * magnitude + 2); };
  for (int64_t batch = 0; batch < kBatches; ++batch) {
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      std::vector<double> dk(static_cast<size_t>(length * width));
      std::vector<double> dv(dk.size());
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t i = 0; i < length; ++i) {
          std::vector<double> weight(static_cast<size_t>(i + 1));
          double total = 0.0;
          for (int64_t j = 0; j <= i; ++j) {
            double score = 0.0;
            for (int64_t d = 0; d < width; ++d) {
              score += q.at(batch, head, i, d) * k.at(batch, kv_head, j, d);
            }
            weight[static_cast<size_t>(j)] = std::exp(score * static_cast<double>(scale));
            total += weight[static_cast<size_t>(j)];
          }
          double delta = 0.0;
          std::vector<double> grad_weight(weight.size());
          for (int64_t j = 0; j <= i; ++j) {
            weight[static_cast<size_t>(j)] /= total;
            for (int64_t d = 0; d < width; ++d) {
              grad_weight[static_cast<size_t>(j)] += grad_out.at(batch, head, i, d) * v.at(batch, kv_head, j, d);
            }
            delta += weight[static_cast<size_t>(j)] * grad_weight[static_cast<size_t>(j)];
          }
          for (int64_t d = 0; d < width; ++d) {
            double expected = 0.0;
            double gradient = 0.0;
            for (int64_t j = 0; j <= i; ++j) {
              const double p = weight[static_cast<size_t>(j)];
              const double ds = p * (grad_weight[static_cast<size_t>(j)] - delta) * static_cast<double>(scale);
              expected += p * v.at(batch, kv_head, j, d);
              gradient += ds * k.at(batch, kv_head, j, d);
              dk[static_cast<size_t>(j * width + d)] += ds * q.at(batch, head, i, d);
              dv[static_cast<size_t>(j * width + d)] += p * grad_out.at(batch, head, i, d);
            }
            const double got = out.at(batch, head, i, d);
            CHECK(std::fabs(got - expected) <= tolerance(1.0), "out [%ld, %ld, %ld] is %a, expected %a",
                  static_cast<long>(head), static_cast<long>(i), static_cast<long>(d), got, expected);
            CHECK(std::fabs(grad_q.at(batch, head, i, d) - gradient) <= tolerance(1.0),
                  "grad_q [%ld, %ld, %ld] is %a, expected %a", static_cast<long>(head), static_cast<long>(i),
                  static_cast<long>(d), grad_q.at(batch, head, i, d), gradient);
          }
        }
      }
      for (int64_t j = 0; j < length; ++j) {
        for (int64_t d = 0; d < width; ++d) {
          const double expected_k = dk[static_cast<size_t>(j * width + d)];
          const double expected_v = dv[static_cast<size_t>(j * width + d)];
          CHECK(std::fabs(grad_k.at(batch, kv_head, j, d) - expected_k) <= tolerance(2.0), "grad_k is %a, expected %a",
                grad_k.at(batch, kv_head, j, d), expected_k);
          CHECK(std::fabs(grad_v.at(batch, kv_head, j, d) - expected_v) <= tolerance(std::fabs(expected_v) + 1.0),
                "grad_v is %a, expected %a", grad_v.at(batch, kv_head, j, d), expected_v);
        }
      }
    }
  }
}

template <typename T>
void check_all(double rounding) {
  check_attention<T>(1, 1, 1, 8, rounding);
  check_attention<T>(3, 1, 17, 40, rounding);
  check_attention<T>(4, 2, 64, 64, rounding);
  check_attention<T>(2, 2, 97, 96, rounding);
  check_attention<T>(2, 1, 258, 32, rounding);
}

TEST(causal_attention_fp32) { check_all<float>(0x1p-20); }
TEST(causal_attention_bf16) { check_all<Bf16>(0x1p-8); }
TEST(causal_attention_fp16) { check_all<Fp16>(0x1p-11); }
TEST(causal_attention_of_a_group_in_turns) { check_attention<float>(2, 1, 40, 1024, 0x1p-20); }  // more than kTurnBytes

}  // namespace
