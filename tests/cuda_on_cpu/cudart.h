// The CUDA runtime's functions, as far as this project calls them, over ordinary memory: so that launchers and bindings
// link without a GPU. The functions themselves are declared by cuda_runtime_api.h. What is stricter than the runtime:
// anything that may not be done while a stream is captured is refused then, whichever stream it would run on.
#pragma once

#include <cuda_runtime_api.h>

namespace cuemu {

// Keeps an error for cudaGetLastError and gives it back.
cudaError_t remember(cudaError_t error);

// Whether some stream is being captured.
bool is_capturing();

}  // namespace cuemu
