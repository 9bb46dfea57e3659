// One step of Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023) over many tensors. Pointers are
// trusted: the bindings check.
#pragma once

#include <cstdint>

#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

// grad_factor multiplies every gradient. The bytes written depend neither on the number of threads nor on the order.
void lion_step(const OptimTensor* tensors,  // [num_tensors]; exp_avg_sq and step are not used
               int64_t num_tensors,
               const LionOptions* options,  // [groups]
               double grad_factor, const UpdateOrder& order = {});

}  // namespace qlora_native::cpu
