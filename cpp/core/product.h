// A matrix product with a quantized weight, or its input gradient, as every device's kernels are given it.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/weight_view.h"

namespace qlora_native {

struct ProductJob {
  WeightView weight;  // [n, k]
  Dtype dtype;        // of x, bias, low, up and y
  bool forward;       // or the input gradient
  const void* x;      // forward: [m, k]; input gradient: the gradient of y, [m, n]
  const void* bias;   // forward: [n] or null; input gradient: null
  const void* low;    // [m, r] or null: the adapter's projection of x (forward) or of the gradient of y
  const void* up;     // forward: [n, r], y += low up^T; input gradient: [r, k], y += low up; null without `low`
  int64_t r;          // 0 without an adapter
  void* y;            // forward: [m, n]; input gradient: [m, k]
  int64_t m;
  int64_t n;
  int64_t k;

  QLORA_NATIVE_HD int64_t depth() const { return forward ? k : n; }  // of x's rows
  QLORA_NATIVE_HD int64_t width() const { return forward ? n : k; }  // of y's
};

}  // namespace qlora_native
