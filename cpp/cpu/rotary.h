// Rotary position embedding in the "half" layout: dimension i of a head is paired with i + head_dim / 2
// (Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021).
#pragma once

#include "core/activations.h"
#include "core/half.h"

namespace qlora_native::cpu {

void rotary(const RotaryJob& job, Dtype dtype);

}  // namespace qlora_native::cpu
