// What the matrix products with a quantised weight are given. Their kernels stand in kernels-gemm-inl.h.
#pragma once

#include <cstdint>

#include "core/weight_view.h"

namespace qlora_native::cpu {

struct ProductJob {
  WeightView weight;  // [n, k]
  const void* x;      // forward: [m, k]; input gradient: the gradient of y, [m, n]; of the table entry's dtype, as are
                      // bias, low, up and y
  const void* bias;   // forward: [n] or null; input gradient: null
  const void* low;    // [m, r] or null: the adapter's projection of x (forward) or of the gradient of y
  const void* up;     // forward: [n, r], y += low up^T; input gradient: [r, k], y += low up; null without `low`
  int64_t r;          // 0 without an adapter
  void* y;            // forward: [m, n]; input gradient: [m, k]
  int64_t m;
  int64_t n;
  int64_t k;
};

// Threads take columns of y in multiples of this, so that no panel of weights is decoded twice.
inline constexpr int64_t kColumnGrain = 64;

}  // namespace qlora_native::cpu
