// y = x W^T + bias + low up^T and its input gradient, with a 4-bit W or a dense one.
//
// Up to few_rows() rows of x, a forward product with a 4-bit W takes an adapter as it is stored: with `as_stored`,
// job.down [r, k] and job.up [n, r] are fp32, low = x down^T, and y += up_scale * low up^T.
#pragma once

#include <cstdint>

#include "cpu/kernels/gemm.h"

namespace qlora_native::cpu {

// Rows of x up to which the vector kernels are faster than tiles where there are such.
inline constexpr int64_t kFewTileRows = 2;

// Rows of x up to which a forward product decodes W row by row.
int64_t few_rows(Dtype dtype);

struct GemmCall {
  GemmJob job;
  bool as_stored = false;
  float up_scale = 1.0f;
};

int64_t linear_4bit_scratch_bytes(const GemmCall& call);
void linear_4bit(const GemmCall& call, unsigned char* scratch);  // scratch: aligned to 64 bytes

// Parts of a product with a 4-bit W, each on the calling thread, for callers that share out many products at once; the
// bits are those of linear_4bit(). The adapter's projection stands before the columns [first, last) of y, of which
// `first` is a multiple of kColumnGrain.
int64_t part_scratch_bytes(const GemmCall& call, int64_t columns);
void project_part(const GemmCall& call, unsigned char* scratch);
void linear_4bit_part(const GemmCall& call, int64_t first, int64_t last, unsigned char* scratch);

// The gradient of a low-rank factor: out [r, width] = scale * left^T right in fp32, left [m, r] and right [m, width] of
// `dtype`.
int64_t outer_scratch_bytes(Dtype dtype, int64_t m, int64_t r, int64_t width);
void outer(Dtype dtype, const void* left, const void* right, int64_t m, int64_t r, int64_t width, float scale,
           float* out, unsigned char* scratch);

// Columns [first, last) of it, on the calling thread, for m > 0.
int64_t outer_part_scratch_bytes(Dtype dtype, const OuterJob& job, int64_t columns);
void outer_part(Dtype dtype, const OuterJob& job, int64_t first, int64_t last, unsigned char* scratch);

}  // namespace qlora_native::cpu
