// Products with a stack of 4-bit matrices, each of which has rows of x of its own, and the gradients of their adapters.
//
// An expert's outputs have the bits of linear_4bit() and outer() for its rows alone, at any number of threads.
#pragma once

#include <cstdint>

#include "cpu/linear_4bit.h"

namespace qlora_native::cpu {

struct Experts {
  int64_t count;
  const int64_t* offsets;  // [count + 1], rising from 0: expert e has the rows [offsets[e], offsets[e + 1])

  int64_t rows(int64_t expert) const { return offsets[expert + 1] - offsets[expert]; }
};

struct ExpertsJob {
  Experts experts;
  // Of all experts: weight [count, n, k], down and up [count, ...], made_low [m, r], which low points to, and x and y
  // with the rows of one expert after those of another. down_scale is for input gradients.
  GemmJob job;
  // For experts of few_rows() in a forward product; the others have job.down and job.up.
  const float* stored_down;  // [count, r, k]
  const float* stored_up;    // [count, n, r]
  float up_scale;            // of stored_up
};

int64_t experts_4bit_scratch_bytes(const ExpertsJob& job);
// Rows behind those of the last expert become zeros. scratch: aligned to 64 bytes.
void experts_4bit(const ExpertsJob& job, unsigned char* scratch);

// out [count, r, width] = scale * left^T right over an expert's rows of left [m, r] and right [m, width].
int64_t experts_outer_scratch_bytes(Dtype dtype, const Experts& experts, const OuterJob& job);
void experts_outer(Dtype dtype, const Experts& experts, const OuterJob& job, unsigned char* scratch);

}  // namespace qlora_native::cpu
