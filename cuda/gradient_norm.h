// The Euclidean norm of many tensors taken as one vector, on a CUDA device: the bits of cpu/gradient_norm.h. Pointers
// are device memory and trusted: the bindings check. Nothing here waits or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/tensor_list.h"

namespace qlora_native::cuda {

// Bytes of the workspace of launch_gradient_norm, at a multiple of 8. All zero before its first use; a launch that has
// run leaves it fit for the next one. Launches that may overlap need one each.
int64_t gradient_norm_workspace(int64_t num_chunks);

// In the order of core/optim.h, whatever the device. Not finite if and only if an element is not. One launch.
cudaError_t launch_gradient_norm(const OptimTable& table,  // only grad, numel and dtype of its tensors are read
                                 void* workspace,          // [gradient_norm_workspace(table.num_chunks)] bytes
                                 double* norm,             // [1]
                                 cudaStream_t stream);

}  // namespace qlora_native::cuda
