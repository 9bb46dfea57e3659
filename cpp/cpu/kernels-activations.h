// Jobs and kernels of what stands between the matrix products. "T" is the dtype of the table entry.
#pragma once

#include <cstdint>

namespace qlora_native::cpu {

struct RmsNormJob {
  const void* x;       // T [rows, width]
  const void* weight;  // T [width]
  int64_t width;
  float eps;
  void* y;      // T [rows, width]
  float* rstd;  // [rows], 1 / sqrt(mean(x^2) + eps)
};

struct RmsNormGradJob {
  const void* grad_y;  // T [rows, width]
  const void* x;       // T [rows, width]
  const void* weight;  // T [width]
  const float* rstd;   // [rows]
  int64_t width;
  void* grad_x;  // T [rows, width]
};

struct SwigluJob {
  const void* gate;  // T [numel]
  const void* up;    // T [numel]
  void* y;           // T [numel]
};

struct SwigluGradJob {
  const void* grad_y;  // T [numel]
  const void* gate;    // T [numel]
  const void* up;      // T [numel]
  void* grad_gate;     // T [numel]
  void* grad_up;       // T [numel]
};

struct RotaryJob {
  const void* x;               // T, x[batch, head, position, 0:head_dim] at the strides below
  int64_t x_strides[3];        // elements from one batch, head, position to the next
  const void* cosine;          // T [1 or batch, length, head_dim]
  const void* sine;            // T [1 or batch, length, head_dim]
  int64_t angle_batch_stride;  // positions from one batch to the next: length, or 0 for angles that all share
  int64_t heads;
  int64_t length;
  int64_t head_dim;
  bool inverse;
  void* y;  // T
  int64_t y_strides[3];
};

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
