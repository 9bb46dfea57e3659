// One step of Adam or AdamW over many tensors. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

// grad_factor multiplies every gradient. The bytes written depend neither on the number of threads nor on the order.
// Steps are counted before the first update.
void adamw_step(const OptimTensor* tensors,  // [num_tensors]
                int64_t num_tensors,
                const AdamwOptions* options,  // [groups]
                double grad_factor, const UpdateOrder& order = {});

}  // namespace qlora_native::cpu
