// The Euclidean norm of many tensors taken as one vector. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

// Summed in double precision in an order that depends on the sizes alone: chunks of 8192 elements, each in 32 running
// sums, then the chunks one after another. It is not finite if and only if an element is not.
double gradient_norm(const OptimTensor* tensors,  // [num_tensors]; only grad, numel and dtype are used
                     int64_t num_tensors);

}  // namespace qlora_native::cpu
