// The table of kernels that each instruction set fills in once (isa_*.cc) and the ops call through.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/product.h"
#include "core/weight_view.h"
#include "cpu/isa/isa.h"
#include "cpu/kernels/activations.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/calibration.h"
#include "cpu/kernels/optim.h"
#include "cpu/kernels/tiles.h"

namespace qlora_native::cpu {

// Threads take columns of y in multiples of this, so that no panel of weights is decoded twice.
inline constexpr int64_t kColumnGrain = 64;

// A product of the vector kernels (kernels/gemm-inl.h): with a 4-bit weight or with a dense one.
struct GemmJob : ProductJob {
  const void* dense = nullptr;  // [n, k] of `dtype`, in place of `weight`; or null
  float scale = 1.0f;           // of the sums, before the bias is added
  // With `down` the adapter's projection is computed first, from the same x, and `low` is where it goes: down_scale * x
  // down^T for down [r, k], or for the input gradient down_scale * x down for down [n, r].
  const void* down = nullptr;
  void* made_low = nullptr;  // [m, r], what low points to
  float down_scale = 1.0f;
};

// What one thread computes at a time: rows [first_row, last_row) by columns [first_column, last_column) of y.
// first_column is a multiple of kColumnGrain.
struct GemmUnit {
  int64_t first_row;
  int64_t last_row;
  int64_t first_column;
  int64_t last_column;
};

// out [r, width] = scale * left^T right, in fp32.
struct OuterJob {
  const void* left;   // [m, r]
  const void* right;  // [m, width], of the same dtype
  int64_t m;
  int64_t r;
  int64_t width;
  float scale;
  float* out;
};

struct GemmKernels {
  // Writes a unit of y. `scratch` is aligned to 64 bytes and has unit_bytes. An output's bits do not depend on the
  // unit.
  void (*product)(const GemmJob& job, const GemmUnit& unit, void* scratch);
  // For units of at most so many rows and columns, a multiple of 64.
  int64_t (*unit_bytes)(const GemmJob& job, int64_t rows, int64_t columns);
  // Whether product() takes a job with `down`. Every unit computes low for its rows then, those from column 0 write it.
  bool (*makes_low)(const GemmJob& job);
  // Writes columns [first, last) of out; m > 0. `scratch` is aligned to 64 bytes and has outer_bytes of so many
  // columns.
  void (*outer)(const OuterJob& job, int64_t first, int64_t last, void* scratch);
  int64_t (*outer_bytes)(int64_t columns);
};

struct BlockJob {
  const void* x;  // [numel], of the table entry's dtype
  int64_t numel;
  int64_t block_size;
  QuantType type;
  uint8_t* packed;  // [ceil(numel / 2)]
  float* absmax;    // [blocks]
};

struct ScaleJob {
  const float* absmax;  // [blocks]
  int64_t blocks;
  float offset;
  uint8_t* codes;        // [blocks]
  float* nested_absmax;  // [ceil(blocks / 256)]
};

struct DenseJob {
  const void* x;  // [m, k], of the table entry's dtype, as is y
  const void* w;  // [n, k]
  void* y;        // [m, n]
  int64_t m;
  int64_t n;
  int64_t k;
};

inline constexpr int64_t kStreamRows = 4;  // rows of W that go together: ranges are cut at multiples

// A forward product of a few tokens, whose adapter is taken as it is stored.
struct RowsJob {
  ProductJob product;     // `low` is given, `up` is not
  const float* up;        // [n, r]
  float up_scale;         // y += up_scale * low up^T
  const void* reordered;  // what the table's `reorder` made of x
};

// Products of a few tokens, for one dtype: rows of W are decoded once each for all of them.
struct RowKernels {
  int64_t most_tokens;  // beyond which the table's columns are the faster ones
  int64_t (*scratch_bytes)(const ProductJob& job);
  void (*reorder)(const ProductJob& job, void* scratch);  // aligned to 64 bytes
  // Writes columns [first, last) of y.
  void (*product)(const RowsJob& job, int64_t first, int64_t last);
};

struct Kernels {
  // Quantizes blocks [first, last). Returns the index of the first non-finite element met, or -1.
  using QuantizeBlocks = int64_t (*)(const BlockJob& job, int64_t first, int64_t last);
  // Writes elements [begin, end) of the flattened weight to out[0, end - begin), past the caches if `stream`.
  using DequantizeSpan = void (*)(const WeightView& weight, int64_t begin, int64_t end, void* out, bool stream);
  // sums[g] of each group g in [first, last) of 256 of the values, added in the order of a halving tree.
  using SumGroups = void (*)(const float* values, int64_t count, int64_t first, int64_t last, double* sums);
  // Double quantization of groups [first, last) of 256 scales.
  using QuantizeScaleGroups = void (*)(const ScaleJob& job, int64_t first, int64_t last);
  // Undoes it for blocks [first, last): scales[0, last - first).
  using DecodeScales = void (*)(const WeightView& weight, int64_t first, int64_t last, float* scales);

  // Writes columns [first, last) of y = x w^T, with w of the entry's dtype or in fp32.
  using DenseRows = void (*)(const DenseJob& job, int64_t first, int64_t last);

  QuantizeBlocks quantize_blocks[3];  // indexed by Dtype
  DequantizeSpan dequantize_span[3];
  SumGroups sum_groups;
  QuantizeScaleGroups quantize_scale_groups;
  DecodeScales decode_scales;
  RowKernels rows[3];
  DenseRows dense_rows[3];
  DenseRows fp32_rows[3];

  GemmKernels gemm[3];       // indexed by Dtype
  const TileKernels* tiles;  // bf16 products by tiles, or null

  OptimKernels optim;
  ActivationKernels activations;
  AttentionKernels attention[3];
  CalibrationKernels calibration;
};

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
const Kernels& neon_bf16_kernels();
#endif

// The table of the instruction set in use.
const Kernels& kernels();

}  // namespace qlora_native::cpu
