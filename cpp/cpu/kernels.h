// The table of kernels that each instruction set fills in once (isa_*.cc) and the ops call through.
#pragma once

#include <cstdint>

#include "core/weight_view.h"
#include "cpu/isa.h"
#include "cpu/kernels-activations.h"
#include "cpu/kernels-attention.h"

namespace qlora_native::cpu {

struct BlockJob {
  const void* x;  // [numel], of the table entry's dtype
  int64_t numel;
  int64_t block_size;
  QuantType type;
  uint8_t* packed;  // [ceil(numel / 2)]
  float* absmax;    // [blocks]
};

inline constexpr int64_t kMaxTokens = 8;  // rows of x that linear_rows takes

struct LinearJob {
  WeightView weight;  // [n, k]
  const void* x;      // [m, k], of the table entry's dtype
  const void* bias;   // [n] of the same dtype, or null
  void* y;            // [m, n] of the same dtype
  int64_t m;
  int64_t n;
  int64_t k;
};

struct Kernels {
  // Quantises blocks [first, last). Returns the index of the first non-finite element met, or -1.
  using QuantizeBlocks = int64_t (*)(const BlockJob& job, int64_t first, int64_t last);
  // Writes elements [begin, end) of the flattened weight to out[0, end - begin).
  using DequantizeSpan = void (*)(const WeightView& weight, int64_t begin, int64_t end, void* out);

  // Writes columns [first, last) of y = x W^T + bias: rows of W, decoded once each for all of x.
  using LinearRows = void (*)(const LinearJob& job, int64_t first, int64_t last);

  QuantizeBlocks quantize_blocks[3];  // indexed by Dtype
  DequantizeSpan dequantize_span[3];
  LinearRows linear_rows[3];
  ActivationKernels activations;
  AttentionKernels attention;
};

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
#endif

// The table of the instruction set in use.
const Kernels& kernels();

}  // namespace qlora_native::cpu
