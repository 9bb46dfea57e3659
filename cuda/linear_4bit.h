// y = x W^T + bias + low up^T and its input gradient on a CUDA device, straight from the stored 4-bit W. Pointers are
// trusted: the bindings check.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/half.h"
#include "core/weight_view.h"
#include "cuda/matmul_plan.h"

namespace qlora_native::cuda {

// x, low, up, y and weight.packed lie at multiples of 16 bytes.
struct LinearCall {
  WeightView weight;  // [n, k]
  Dtype dtype;        // of x, bias, low, up and y: bf16 or fp16
  bool forward;
  const void* x;     // forward: [m, k]; input gradient: the gradient of y, [m, n]
  const void* bias;  // forward: [n] or null; input gradient: null
  const void* low;   // [m, r] or null: the adapter's projection of x (forward) or of the gradient of y
  const void* up;    // forward: [n, r], y += low up^T; input gradient: [r, k], y += low up; null without `low`
  int64_t r;         // 0 without an adapter
  void* y;           // forward: [m, n]; input gradient: [m, k]
  int64_t m;
  int64_t n;
  int64_t k;
};

// Does not wait. `plan` is plan_matmul's for these sizes, or another of the same fields for which fused_is_possible();
// kTwoStep is cudaErrorInvalidValue. The result depends on the plan, never on timing: sums have a fixed order.
cudaError_t launch_linear_4bit(const LinearCall& call, const MatmulPlan& plan,
                               void* workspace,  // [plan.workspace_bytes], at a multiple of 16 bytes; or null if 0
                               cudaStream_t stream);

}  // namespace qlora_native::cuda
