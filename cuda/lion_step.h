// One step of Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023) over many tensors on a CUDA
// device: the bytes of cpu/lion_step.h. Pointers are device memory and trusted: the bindings check. Nothing here waits
// or allocates; a step can be captured in a graph and replayed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/tensor_list.h"

namespace qlora_native::cuda {

inline constexpr int kLionRow = 4;  // lr, beta1, beta2, weight_decay

// As launch_adamw_step; exp_avg_sq and step of the tensors are not used.
cudaError_t launch_lion_step(const OptimTable& table,
                             const double* options,  // [groups, kLionRow]
                             const StepInputs& inputs, const StepResults& results,
                             uint32_t* finished,  // [1] 0 before its first use, which every launch leaves
                             cudaStream_t stream);

}  // namespace qlora_native::cuda
