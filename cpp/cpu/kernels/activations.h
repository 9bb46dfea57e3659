// Kernels of core/activations.h and of the softmax.
#pragma once

#include <cstdint>

#include "core/activations.h"

namespace qlora_native::cpu {

struct SoftmaxRow {
  float top;     // largest logit
  float sum;     // of exp(logit - top)
  float chosen;  // the target's logit
};

struct ActivationKernels {
  void (*rms_norm_rows[3])(const RmsNormJob& job, int64_t first, int64_t last);  // indexed by Dtype
  void (*rms_norm_grad_rows[3])(const RmsNormGradJob& job, int64_t first, int64_t last);
  void (*swiglu_span[3])(const SwigluJob& job, int64_t first, int64_t last);  // elements
  void (*swiglu_grad_span[3])(const SwigluGradJob& job, int64_t first, int64_t last);
  void (*rotary_positions[3])(const RotaryJob& job, int64_t first, int64_t last);  // of [batch, length] flattened
  SoftmaxRow (*softmax_row[3])(void* row, int64_t vocabulary, int64_t target, bool need_gradient);
};

// Elements that make a task worth a thread.
inline constexpr int64_t kActivationsPerTask = 1 << 14;

}  // namespace qlora_native::cpu
