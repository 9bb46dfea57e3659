// Lion over many tensors.
#pragma once

#include <cstdint>

#include "core/optim.h"
#include "cuda/lion_step.h"
#include "cuda/step_frame.cuh"

namespace qlora_native::cuda {

struct LionRule {
  using Factors = LionFactors;
  static constexpr int kRow = kLionRow;
  static constexpr bool kSecondMoment = false;
  static constexpr bool kCountsSteps = false;

  static __device__ __forceinline__ Factors factors(const double* row,  // [kRow]
                                                    const OptimTensor&, double grad_factor) {
    return lion_factors({row[0], row[1], row[2], row[3]}, grad_factor);
  }

  // The rate is 0 where the direction is 0 or NaN.
  static __device__ __forceinline__ float element(const Factors& by, float decay1, float decay2, float p, float g,
                                                  float& m, float&) {
    g = g * by.grad_factor;
    const float direction = m * decay1 + g * by.rest1;
    const float rate = direction > 0.0f ? by.lr : direction < 0.0f ? -by.lr : 0.0f;
    m = m * decay2 + g * by.rest2;
    return p * by.keep - rate;
  }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 7)
    lion_step_kernel(const OptimTable table,
                     const double* __restrict__ options,  // [groups, kLionRow]
                     const StepInputs inputs, const StepResults results,
                     uint32_t* finished) {  // [1]
  run_step<LionRule>(table, options, inputs, results, finished);
}

}  // namespace qlora_native::cuda
