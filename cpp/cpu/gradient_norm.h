// The Euclidean norm of many tensors taken as one vector. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

// In the order of core/optim.h, whatever the number of threads. It is not finite if and only if an element is not.
double gradient_norm(const OptimTensor* tensors,  // [num_tensors]; only grad, numel and dtype are used
                     int64_t num_tensors);

}  // namespace qlora_native::cpu
