// What an optimizer's kernel is given for one tensor, and the table entries of the optimizers.
#pragma once

#include <cstdint>

#include "core/optim.h"

namespace qlora_native::cpu {

// One tensor of an AdamW step. The states are fp32, or codes with an absmax for each kStateBlock of elements.
struct AdamwJob {
  void* param;               // [numel], of the table entry's dtype
  const void* grad;          // [numel] of the same dtype
  void* exp_avg;             // [numel] float, or int8_t
  void* exp_avg_sq;          // [numel] float, or uint8_t
  float* exp_avg_absmax;     // [ceil(numel / kStateBlock)], or null: then both states are fp32
  float* exp_avg_sq_absmax;  // [ceil(numel / kStateBlock)], or null
  int64_t numel;
  AdamwFactors by;
};

struct LionJob {
  void* param;            // [numel], of the table entry's dtype
  const void* grad;       // [numel] of the same dtype
  void* exp_avg;          // [numel] float, or int8_t
  float* exp_avg_absmax;  // [ceil(numel / kStateBlock)], or null: then the state is fp32
  int64_t numel;
  LionFactors by;
};

// Each is indexed by Dtype. Blocks are kStateBlock elements of a tensor, the last one shorter.
struct OptimKernels {
  using AdamwBlocks = void (*)(const AdamwJob& job, int64_t first, int64_t last);
  using LionBlocks = void (*)(const LionJob& job, int64_t first, int64_t last);
  // Sum of squares of `count` <= kNormChunk elements, in an order that depends on nothing else.
  using SumOfSquares = double (*)(const void* x, int64_t count);

  AdamwBlocks adamw_blocks[3];
  LionBlocks lion_blocks[3];
  SumOfSquares sum_of_squares[3];
};

}  // namespace qlora_native::cpu
