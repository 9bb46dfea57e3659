// Codes of a matrix under given scales, each column's rounding error made good by the later columns. Pointers are
// trusted: the bindings check.
#pragma once

#include <cstdint>

#include "core/codebook.h"
#include "core/half.h"

namespace qlora_native::cpu {

// The i-th column in `order` adds (weight - decoded) * factor[i, j] to every later one, j. The bytes depend on neither
// the number of threads nor the instruction set.
void gptq_4bit(const void* x,  // [n, k]
               Dtype dtype, int64_t n, int64_t k, int64_t block_size, QuantType type,
               const float* factor,   // [k, k], read above the diagonal
               const int64_t* order,  // [k], a permutation
               const float* scales,   // [blocks]
               uint8_t* packed);      // [ceil(n * k / 2)]

}  // namespace qlora_native::cpu
