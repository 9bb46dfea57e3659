// y = x W^T + bias + low up^T and its input gradient on a CUDA device, straight from the stored 4-bit W. Pointers are
// trusted: the bindings check.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/product.h"
#include "cuda/matmul_plan.h"

namespace qlora_native::cuda {

// Does not wait. A weight in a format of GGUF takes kGemv alone. Of `product`, dtype is bf16 or fp16, and x, low, up, y
// and weight.packed lie at multiples of 16 bytes. `plan` is plan_matmul's for these sizes, or another of the same
// fields for which fused_is_possible(); kTwoStep is cudaErrorInvalidValue. The result depends on the plan, never on
// timing: sums have a fixed order.
cudaError_t launch_linear_4bit(const ProductJob& product, const MatmulPlan& plan,
                               void* workspace,  // [plan.workspace_bytes], at a multiple of 16 bytes; or null if 0
                               cudaStream_t stream);

}  // namespace qlora_native::cuda
