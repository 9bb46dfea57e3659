// One step of Adam or AdamW over many tensors on a CUDA device: the bytes of cpu/adamw_step.h. Pointers are device
// memory and trusted: the bindings check. Nothing here waits or allocates; a step can be captured in a graph and
// replayed, for all that changes from step to step is read from device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/tensor_list.h"

namespace qlora_native::cuda {

inline constexpr int kAdamwRow = 5;  // lr, beta1, beta2, eps, weight_decay

// One launch; after launch_gradient_norm where `inputs` hold a norm. Tensors of all dtypes and both forms of states may
// stand in one table; no two of them share memory. With every pointer at a multiple of 16 bytes it is fast. A NaN is
// NaN as on the CPU, but its bits are the device's.
cudaError_t launch_adamw_step(const OptimTable& table,
                              const double* options,  // [groups, kAdamwRow]
                              bool decoupled,         // of AdamwOptions
                              const StepInputs& inputs, const StepResults& results,
                              uint32_t* finished,  // [1] 0 before its first use, which every launch leaves
                              cudaStream_t stream);

}  // namespace qlora_native::cuda
