#include "cuda/grid.h"
#include "cuda/lion_step.cuh"
#include "cuda/lion_step.h"

namespace qlora_native::cuda {

cudaError_t launch_lion_step(const OptimTable& table, const double* options, const StepInputs& inputs,
                             const StepResults& results, uint32_t* finished, cudaStream_t stream) {
  return wp::launch(lion_step_kernel<kStepThreads>, dim3(grid_blocks(table.num_chunks, 1)), dim3(kStepThreads), 0,
                    stream, table, options, inputs, results, finished);
}

}  // namespace qlora_native::cuda
