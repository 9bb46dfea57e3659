#include "cuda/adamw_step.cuh"
#include "cuda/adamw_step.h"
#include "cuda/grid.h"

namespace qlora_native::cuda {

cudaError_t launch_adamw_step(const OptimTable& table, const double* options, bool decoupled, const StepInputs& inputs,
                              const StepResults& results, uint32_t* finished, cudaStream_t stream) {
  const auto kernel = decoupled ? adamw_step_kernel<true> : adamw_step_kernel<false>;
  return wp::launch(kernel, dim3(grid_blocks(table.num_chunks, 1)), dim3(kStepThreads), 0, stream, table, options,
                    inputs, results, finished);
}

}  // namespace qlora_native::cuda
