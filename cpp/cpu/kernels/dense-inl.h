// Forward products of a few tokens with a dense W, whose bytes are the work: an output embedding that stays in 16 bits.
#include "cpu/isa/vec.h"
#include "cpu/kernels/kernels.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// The step of an inner product of x in T with W in another dtype.
template <typename T, typename W>
struct MixedDot : Dot<float> {
  template <typename V>
  static Floats load_operand(const V* p) {
    return load(p);
  }
};
template <typename T>
struct MixedDot<T, T> : Dot<T> {};

// Two rows of W against one of x, fp32 sums in an order that depends on k alone. `ahead` lies in W, where it is read
// soon; its lines are called for at the pace of this.
template <typename T, typename W>
inline void dense_pair(const T* x, const W* w0, const W* w1, int64_t k, const char* ahead, float* sums) {
  using D = MixedDot<T, W>;
  Floats first[2] = {zero(), zero()};
  Floats second[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * D::kStep <= k; i += 2 * D::kStep) {
    for (int64_t line = 0; line < 4 * D::kStep * static_cast<int64_t>(sizeof(W)); line += 64) {
      __builtin_prefetch(ahead + 2 * i * static_cast<int64_t>(sizeof(W)) + line);
    }
    for (int u = 0; u < 2; ++u) {
      const auto value = D::load_operand(x + i + u * D::kStep);
      first[u] = D::step(value, D::load_operand(w0 + i + u * D::kStep), first[u]);
      second[u] = D::step(value, D::load_operand(w1 + i + u * D::kStep), second[u]);
    }
  }
  sums[0] = total(first[0]) + total(first[1]);
  sums[1] = total(second[0]) + total(second[1]);
  for (; i < k; ++i) {
    sums[0] += to_float(x[i]) * to_float(w0[i]);
    sums[1] += to_float(x[i]) * to_float(w1[i]);
  }
}

template <typename T, typename W>
void dense_rows(const DenseJob& job, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(job.x);
  T* y = static_cast<T*>(job.y);
  const int64_t pair_bytes = 2 * job.k * static_cast<int64_t>(sizeof(W));
  const int64_t distance = pair_bytes < 4096 ? 4096 : pair_bytes;
  for (int64_t row = first; row < last; row += 2) {
    const W* w0 = static_cast<const W*>(job.w) + row * job.k;
    const W* w1 = row + 1 < last ? w0 + job.k : w0;
    for (int64_t token = 0; token < job.m; ++token) {
      float sums[2];
      dense_pair(x + token * job.k, w0, w1, job.k, reinterpret_cast<const char*>(w0) + distance, sums);
      y[token * job.n + row] = from_float<T>(sums[0]);
      if (row + 1 < last) {
        y[token * job.n + row + 1] = from_float<T>(sums[1]);
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
