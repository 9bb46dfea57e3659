// Adam and AdamW over many tensors.
#pragma once

#include <cstdint>

#include "core/optim.h"
#include "cuda/adamw_step.h"
#include "cuda/step_frame.cuh"

namespace qlora_native::cuda {

template <bool kDecoupled>
struct AdamwRule {
  using Factors = AdamwFactors;
  static constexpr int kRow = kAdamwRow;
  static constexpr bool kSecondMoment = true;
  static constexpr bool kCountsSteps = true;

  static __device__ __forceinline__ Factors factors(const double* row,  // [kRow]
                                                    const OptimTensor& tensor, double grad_factor) {
    const AdamwOptions by{row[0], row[1], row[2], row[3], row[4], kDecoupled};
    return adamw_factors(by, static_cast<int64_t>(*tensor.step + 1.0f), grad_factor);
  }

  static __device__ __forceinline__ float element(const Factors& by, float decay1, float decay2, float p, float g,
                                                  float& m, float& v) {
    g = g * by.grad_factor;
    if (!kDecoupled && by.coupled_decay != 0.0f) {
      g = g + p * by.coupled_decay;
    }
    m = m * decay1 + g * by.rest1;
    v = v * decay2 + (g * by.rest2) * g;
    return p * by.keep - (m * by.step_size) / (sqrtf(v) * by.root_correction + by.eps);
  }
};

template <bool kDecoupled>
__global__ void __launch_bounds__(kStepThreads, 5)
    adamw_step_kernel(const OptimTable table,
                      const double* __restrict__ options,  // [groups, kAdamwRow]
                      const StepInputs inputs, const StepResults results,
                      uint32_t* finished) {  // [1]
  run_step<AdamwRule<kDecoupled>>(table, options, inputs, results, finished);
}

}  // namespace qlora_native::cuda
