// The codes nearest to W + scale * B A under the scales that W has. Pointers are trusted: the bindings check.
#pragma once

#include "cpu/kernels.h"

namespace qlora_native::cpu {

// Writes all codes. The bytes depend on neither the number of threads nor the instruction set.
void requantize_4bit(const RequantizeJob& job);

}  // namespace qlora_native::cpu
