// CUDA's keywords and built-in variables for a host compiler. Includes the CUDA headers, which must come first.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The headers make these attributes of nvcc's. Shared memory is WP_SHARED's and dyn_smem's alone: a plain __shared__
// would have no bounds here, so it does not compile.
#undef __shared__
#define __shared__ use_WP_SHARED_or_dyn_smem
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __maxnreg__
#define __maxnreg__(registers)

// Set by the scheduler whenever a thread goes on.
inline uint3 threadIdx{};
inline uint3 blockIdx{};
inline dim3 blockDim{};
inline dim3 gridDim{};
inline constexpr int warpSize = 32;
