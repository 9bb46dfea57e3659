// What the optimizers' launches are given: a table of tensors in device memory, cut into chunks for thread blocks.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/optim.h"

namespace qlora_native::cuda {

// kNormChunk elements of a tensor, from index * kNormChunk on; the last chunk of a tensor may be shorter.
struct OptimChunk {
  int32_t tensor;
  int32_t index;
};

// Everything that a table points to lies in device memory, the pointers inside the tensors too. The chunks are those of
// fill_chunks; they depend on the tensors' sizes alone and stay from step to step.
struct OptimTable {
  const OptimTensor* tensors;  // [num_tensors]
  const OptimChunk* chunks;    // [num_chunks]
  int64_t num_tensors;
  int64_t num_chunks;
};

constexpr int64_t chunks_of(int64_t numel) { return ceil_div(numel, kNormChunk); }

constexpr int64_t count_chunks(const OptimTensor* tensors,  // [num_tensors], host; only numel is read
                               int64_t num_tensors) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    count += chunks_of(tensors[i].numel);
  }
  return count;
}

constexpr void fill_chunks(const OptimTensor* tensors,  // [num_tensors], host; only numel is read
                           int64_t num_tensors,
                           OptimChunk* chunks) {  // [count_chunks(tensors, num_tensors)], host
  for (int64_t i = 0; i < num_tensors; ++i) {
    for (int64_t j = 0; j < chunks_of(tensors[i].numel); ++j) {
      *chunks++ = {static_cast<int32_t>(i), static_cast<int32_t>(j)};
    }
  }
}

// What a step multiplies every gradient by, and what stops it. Pointers are device memory or null; null where there is
// no such thing.
struct StepInputs {
  double grad_factor;
  double max_norm;          // of all gradients together; read where there is a norm
  const float* grad_scale;  // [1] the gradients carry this factor: they are divided by it
  const float* found_inf;   // [1] not 0: the step is skipped
  const double* norm;       // [1] of the gradients as they stand, from launch_gradient_norm: they are clipped by it,
                            // and the step is skipped unless it is finite
};

// Written by every step, in device memory; null where not wanted.
struct StepResults {
  double* grad_norm;  // [1] the norm, unscaled but not clipped; 0 without a norm
  float* skipped;     // [1] 1: nothing was updated and no step was counted; else 0
};

}  // namespace qlora_native::cuda
