// y = x W^T + bias for a few rows of x, straight from the packed bytes. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/weight_view.h"

namespace qlora_native::cpu {

// The most rows of x that linear_4bit takes. Beyond them a GEMM on decoded panels is faster.
int64_t linear_4bit_max_tokens();

// W is decoded to x's dtype by the exact rule and summed in fp32; the order of the sums is fixed, whatever the threads.
void linear_4bit(const WeightView& weight,  // [n, k]
                 Dtype dtype,
                 const void* x,     // [m, k]
                 const void* bias,  // [n] or null
                 int64_t m, int64_t n, int64_t k,
                 void* y);  // [m, n]

}  // namespace qlora_native::cpu
