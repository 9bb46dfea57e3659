#include "cuda/gradient_norm.cuh"
#include "cuda/gradient_norm.h"
#include "cuda/grid.h"

namespace qlora_native::cuda {

int64_t gradient_norm_workspace(int64_t num_chunks) { return (1 + num_chunks) * static_cast<int64_t>(sizeof(double)); }

cudaError_t launch_gradient_norm(const OptimTable& table, void* workspace, double* norm, cudaStream_t stream) {
  // The count of finished warps is a 32-bit number.
  constexpr int64_t kMostNormBlocks = kMostBlocks / kNormWarps;
  return wp::launch(gradient_norm_kernel<kNormWarps>, dim3(grid_blocks(table.num_chunks, kNormWarps, kMostNormBlocks)),
                    dim3(32 * kNormWarps), 0, stream, table, static_cast<double*>(workspace) + 1,
                    static_cast<uint32_t*>(workspace), norm);
}

}  // namespace qlora_native::cuda
