// One step of Adam or AdamW over many tensors. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

// grad_factor multiplies every gradient. The bytes written do not depend on the number of threads.
void adamw_step(const OptimTensor* tensors,  // [num_tensors]
                int64_t num_tensors,
                const AdamwOptions* options,  // [groups]
                double grad_factor);

}  // namespace qlora_native::cpu
