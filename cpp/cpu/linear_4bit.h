// y = x W^T + bias + low up^T and its input gradient, with a 4-bit W.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/product.h"

namespace qlora_native::cpu {

// With `down`, the product also makes `job.low` [m, r] itself, from the packed x that it needs anyway: x down^T, with
// down [r, k], or for the gradient x down, with down [n, r]. Only where low_rank_is_native().
//
// Up to few_rows() rows of x, a forward product takes an adapter only `as_stored`: `down` [r, k] and `job.up` [n, r]
// are fp32, low = x down^T, and y += up_scale * low up^T.
struct LinearCall {
  ProductJob job;
  const void* down;  // or null
  void* low;         // written if `down` is given; job.low then points here too
  float low_scale;   // with `down`, its sums are multiplied by this before they are rounded
  bool as_stored;
  float up_scale;
};

// Rows of x up to which the vector kernels are faster than tiles where there are such.
inline constexpr int64_t kFewTileRows = 2;

// Rows of x up to which a forward product decodes W row by row.
int64_t few_rows(Dtype dtype);

// Whether this machine computes a product's low-rank part, and the outer products of its gradients, natively.
bool low_rank_is_native(Dtype dtype);

int64_t linear_4bit_scratch_bytes(const LinearCall& call);
void linear_4bit(const LinearCall& call, unsigned char* scratch);  // scratch: aligned to 64 bytes

// The gradient of a low-rank factor: out [r, width] = scale * left^T right in fp32, left [m, r], right [m, width].
int64_t outer_scratch_bytes(int64_t m, int64_t r);
void outer(const void* left, const void* right, int64_t m, int64_t r, int64_t width, float scale, float* out,
           unsigned char* scratch);

}  // namespace qlora_native::cpu
