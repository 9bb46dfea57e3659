// Root-mean-square norm over the last axis (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019).
#pragma once

#include "core/activations.h"
#include "core/half.h"

namespace qlora_native::cpu {

void rms_norm(const RmsNormJob& job, int64_t rows, Dtype dtype);

void rms_norm_backward(const RmsNormGradJob& job, int64_t rows, Dtype dtype);

}  // namespace qlora_native::cpu
