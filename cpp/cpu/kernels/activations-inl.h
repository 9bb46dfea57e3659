// What stands between the matrix products of a step: norms, gates, rotations, and the softmax of the loss. Rows are
// independent, so the bytes depend neither on the instruction set nor on the number of threads.
#pragma once

#include "cpu/isa/vec.h"
#include "cpu/kernels/activations.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

inline float reciprocal_root(float x) {
#if defined(__AVX2__)
  return 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return 1.0f / __builtin_sqrtf(x);
#endif
}

// y = w * round(x / rms(x)), the rounding points of LlamaRMSNorm.
template <typename T>
void rms_norm_rows(const RmsNormJob& job, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(job.weight);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    T* y = static_cast<T*>(job.y) + row * job.width;
    Sixteen squares = splat(0.0f);
    by_sixteen(job.width, [&](const auto& get, const auto&) {
      const Sixteen v = get(x, 0.0f);
      squares = squares + v * v;
    });
    const float rstd = reciprocal_root(sum16(squares) / static_cast<float>(job.width) + job.eps);
    job.rstd[row] = rstd;
    const Sixteen scale = splat(rstd);
    by_sixteen(job.width,
               [&](const auto& get, const auto& put) { put(y, get(weight, 0.0f) * rounded<T>(get(x, 0.0f) * scale)); });
  }
}

// grad_x = rstd * (g - n * mean(g n)) with g = grad_y * weight, n = x * rstd.
template <typename T>
void rms_norm_grad_rows(const RmsNormGradJob& job, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(job.weight);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    const T* grad_y = static_cast<const T*>(job.grad_y) + row * job.width;
    T* grad_x = static_cast<T*>(job.grad_x) + row * job.width;
    const Sixteen rstd = splat(job.rstd[row]);
    Sixteen products = splat(0.0f);
    by_sixteen(job.width, [&](const auto& get, const auto&) {
      products = products + (get(grad_y, 0.0f) * get(weight, 0.0f)) * (get(x, 0.0f) * rstd);
    });
    const Sixteen mean = splat(sum16(products) / static_cast<float>(job.width));
    by_sixteen(job.width, [&](const auto& get, const auto& put) {
      const Sixteen g = get(grad_y, 0.0f) * get(weight, 0.0f);
      put(grad_x, rstd * (g - (get(x, 0.0f) * rstd) * mean));
    });
  }
}

inline Sixteen sigmoid16(Sixteen x) { return splat(1.0f) / (splat(1.0f) + exp16(splat(0.0f) - x)); }

// y = round(silu(gate)) * up over elements [first, last).
template <typename T>
void swiglu_span(const SwigluJob& job, int64_t first, int64_t last) {
  const T* gate = static_cast<const T*>(job.gate) + first;
  const T* up = static_cast<const T*>(job.up) + first;
  T* y = static_cast<T*>(job.y) + first;
  by_sixteen(last - first, [&](const auto& get, const auto& put) {
    const Sixteen g = get(gate, 0.0f);
    put(y, rounded<T>(g * sigmoid16(g)) * get(up, 0.0f));
  });
}

template <typename T>
void swiglu_grad_span(const SwigluGradJob& job, int64_t first, int64_t last) {
  const T* grad_y = static_cast<const T*>(job.grad_y) + first;
  const T* gate = static_cast<const T*>(job.gate) + first;
  const T* up = static_cast<const T*>(job.up) + first;
  T* grad_gate = static_cast<T*>(job.grad_gate) + first;
  T* grad_up = static_cast<T*>(job.grad_up) + first;
  by_sixteen(last - first, [&](const auto& get, const auto& put) {
    const Sixteen g = get(gate, 0.0f);
    const Sixteen dy = get(grad_y, 0.0f);
    const Sixteen s = sigmoid16(g);
    put(grad_up, dy * rounded<T>(g * s));
    put(grad_gate, (dy * get(up, 0.0f)) * (s * (splat(1.0f) + g * (splat(1.0f) - s))));
  });
}

// Rotates pairs (x[i], x[i + half]) of one head by the angles of its position; each product is rounded, as a chain of
// torch ops would. The inverse is the transpose, which is the derivative.
template <typename T, bool kInverse>
void rotary_head(const T* x, const T* cosine, const T* sine, int64_t half, T* y) {
  by_sixteen(half, [&](const auto& get, const auto& put) {
    const Sixteen a = get(x, 0.0f);
    const Sixteen b = get(x + half, 0.0f);
    const Sixteen c1 = get(cosine, 0.0f);
    const Sixteen c2 = get(cosine + half, 0.0f);
    const Sixteen s1 = get(sine, 0.0f);
    const Sixteen s2 = get(sine + half, 0.0f);
    if constexpr (kInverse) {
      put(y, rounded<T>(a * c1) + rounded<T>(b * s2));
      put(y + half, rounded<T>(b * c2) - rounded<T>(a * s1));
    } else {
      put(y, rounded<T>(a * c1) - rounded<T>(b * s1));
      put(y + half, rounded<T>(b * c2) + rounded<T>(a * s2));
    }
  });
}

// Positions [first, last) of [batch, length] flattened: every head of each.
template <typename T>
void rotary_positions(const RotaryJob& job, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; ++at) {
    const int64_t batch = at / job.length;
    const int64_t position = at % job.length;
    const int64_t angle = (batch * job.angle_batch_stride + position) * job.head_dim;
    const T* cosine = static_cast<const T*>(job.cosine) + angle;
    const T* sine = static_cast<const T*>(job.sine) + angle;
    for (int64_t head = 0; head < job.heads; ++head) {
      const T* x = static_cast<const T*>(job.x) + batch * job.x_strides[0] + head * job.x_strides[1] +
                   position * job.x_strides[2];
      T* y = static_cast<T*>(job.y) + batch * job.y_strides[0] + head * job.y_strides[1] + position * job.y_strides[2];
      if (job.inverse) {
        rotary_head<T, true>(x, cosine, sine, job.head_dim / 2, y);
      } else {
        rotary_head<T, false>(x, cosine, sine, job.head_dim / 2, y);
      }
    }
  }
}

// One row of logits [vocabulary]: returns its largest value, the sum of exp(logit - largest), and the target's logit.
// With need_gradient the row becomes softmax - onehot, in place.
template <typename T>
SoftmaxRow softmax_row(void* row, int64_t vocabulary, int64_t target, bool need_gradient) {
  constexpr float kLowest = -3.402823466e38f;  // fills up the last group: e^(kLowest - largest) is 0
  T* logits = static_cast<T*>(row);
  const float chosen = to_float(logits[target]);
  Sixteen highest = splat(kLowest);
  by_sixteen(vocabulary, [&](const auto& get, const auto&) { highest = larger(highest, get(logits, kLowest)); });
  const float top = max16(highest);
  const Sixteen shift = splat(top);
  Sixteen sums = splat(0.0f);
  by_sixteen(vocabulary, [&](const auto& get, const auto&) { sums = sums + exp16(get(logits, kLowest) - shift); });
  const float sum = sum16(sums);
  if (need_gradient) {
    const Sixteen share = splat(1.0f / sum);
    by_sixteen(vocabulary,
               [&](const auto& get, const auto& put) { put(logits, exp16(get(logits, kLowest) - shift) * share); });
    // From the unrounded probability: rounded to 16 bits, its distance from one would be lost.
    float probability[kSixteen];
    store16(probability, exp16(splat(chosen) - shift) * share);
    logits[target] = from_float<T>(probability[0] - 1.0f);
  }
  return {top, sum, chosen};
}

constexpr ActivationKernels kActivations = {
    {rms_norm_rows<float>, rms_norm_rows<Bf16>, rms_norm_rows<Fp16>},
    {rms_norm_grad_rows<float>, rms_norm_grad_rows<Bf16>, rms_norm_grad_rows<Fp16>},
    {swiglu_span<float>, swiglu_span<Bf16>, swiglu_span<Fp16>},
    {swiglu_grad_span<float>, swiglu_grad_span<Bf16>, swiglu_grad_span<Fp16>},
    {rotary_positions<float>, rotary_positions<Bf16>, rotary_positions<Fp16>},
    {softmax_row<float>, softmax_row<Bf16>, softmax_row<Fp16>},
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
