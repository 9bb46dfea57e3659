// Products of the vector kernels over threads: y = x W^T + bias + low up^T or y = x W + low up, W 4-bit or dense.
#pragma once

#include <cstdint>

#include "cpu/kernels/kernels.h"

namespace qlora_native::cpu {

// How a product is shared out: y is cut into units of rows by columns, which threads take one after another.
struct GemmPlan {
  int64_t row_cuts;     // units along the rows
  int64_t columns;      // of a unit, a multiple of kColumnGrain
  int64_t column_cuts;  // units along the columns

  int64_t units() const { return row_cuts * column_cuts; }
  GemmUnit unit(int64_t index, int64_t m, int64_t width) const;
};

// What a unit costs beside its products: decoding panels of W, as so many of its rows, and packing rows of x, as so
// many of its columns (measured: products of 16 and of 1,024 rows, and of 64 and of 1,536 columns).
inline constexpr int64_t kDecodeRows = 10;
inline constexpr int64_t kPackColumns = 6;

// The plan for m rows and `width` columns of y.
GemmPlan plan_gemm(int64_t m, int64_t width, int64_t threads);

int64_t gemm_scratch_bytes(const GemmJob& job);
void gemm(const GemmJob& job, unsigned char* scratch);  // scratch: aligned to 64 bytes

// On the calling thread, with the same bits: the adapter's projection of a job with `down`, and columns [first, last)
// of y for a job whose `low` is given. The scratch is for both.
int64_t gemm_part_bytes(const GemmJob& job, int64_t columns);
void gemm_low(const GemmJob& job, unsigned char* scratch);
void gemm_part(GemmJob job, int64_t first, int64_t last, unsigned char* scratch);

// An outer product of tensors of `dtype`.
int64_t gemm_outer_scratch_bytes(Dtype dtype, int64_t m, int64_t r, int64_t width);
void gemm_outer(Dtype dtype, const OuterJob& job, unsigned char* scratch);

}  // namespace qlora_native::cpu
