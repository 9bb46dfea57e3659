// The CUDA runtime's functions, as far as this project calls them, over ordinary memory: so that launchers and bindings
// link without a GPU. The functions themselves are declared by cuda_runtime_api.h.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_on_cpu/context.h"

namespace cuemu {

// Keeps an error for cudaGetLastError and gives it back.
cudaError_t remember(cudaError_t error);

}  // namespace cuemu

// The first line of a function that a broken context refuses.
#define CUEMU_REQUIRE_CONTEXT()                                                          \
  do {                                                                                   \
    if (const cudaError_t standing = cuemu::standing_error(); standing != cudaSuccess) { \
      return cuemu::remember(standing);                                                  \
    }                                                                                    \
  } while (false)
