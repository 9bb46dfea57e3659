// Norms, gates and rotations: the operations between matrix products, for any device. "T" is the dtype that a job comes
// with.
#pragma once

#include <cstdint>

namespace qlora_native {

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
  const void* cosine;          // T [1 or batches, length, head_dim]
  const void* sine;            // T [1 or batches, length, head_dim]
  int64_t angle_batch_stride;  // positions from one batch to the next: length, or 0 for angles that all share
  int64_t batches;
  int64_t heads;
  int64_t length;
  int64_t head_dim;
  bool inverse;  // the transposed rotation, which is the derivative
  void* y;       // T
  int64_t y_strides[3];
};

}  // namespace qlora_native
