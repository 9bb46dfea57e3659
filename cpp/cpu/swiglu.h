// silu(gate) * up (Shazeer, "GLU Variants Improve Transformer", 2020), element by element.
#pragma once

#include "core/activations.h"
#include "core/half.h"

namespace qlora_native::cpu {

void swiglu(const SwigluJob& job, int64_t numel, Dtype dtype);

void swiglu_backward(const SwigluGradJob& job, int64_t numel, Dtype dtype);

}  // namespace qlora_native::cpu
