// Rotary position embedding in the "half" layout: dimension i of a head is paired with i + head_dim / 2
// (Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021).
#pragma once

#include "core/half.h"
#include "cpu/kernels-activations.h"

namespace qlora_native::cpu {

// With job.inverse the transposed rotation, which is the derivative.
void rotary(const RotaryJob& job, int64_t batches, Dtype dtype);

}  // namespace qlora_native::cpu
