// Which kernel multiplies by a 4-bit weight, and with what tiles: a pure function of sizes, so that it is tested
// without a GPU. The one home of the tiles, of their shared memory and of the crossovers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/codebook.h"
#include "core/gguf.h"
#include "core/half.h"

namespace qlora_native::cuda {

enum class MatmulKind : int {
  kGemv = 0,     // M <= 16, forward: weights on the 16-row side of the MMA, one launch, no workspace
  kSplitK = 1,   // the reduction is cut into `splits` parts, summed in a fixed order by a second launch
  kTile = 2,     // one CTA a tile of y, over the whole reduction
  kTwoStep = 3,  // no fused kernel: dequantize, then call a library's GEMM
};

struct MatmulQuestion {
  int64_t m;               // tokens
  int64_t n;               // rows of W [n, k]
  int64_t k;               // columns of W
  int64_t r;               // of the low-rank term, 0 without
  int64_t block_size;      // elements a scale
  Dtype dtype;             // of x and y
  bool forward;            // y = x W^T [m, n], or the input gradient dx = dy W [m, k]
  bool low_memory;         // never two steps, if a fused kernel can do it at all
  int compute_capability;  // 10 * major + minor, e.g. 86
  int sm_count;
  QuantType type = QuantType::kNf4;  // of W; those of GGUF are fused forward alone
};

struct MatmulPlan {
  MatmulKind kind;
  int rows;                 // of y in a CTA's tile (tokens); kGemv: tokens, 4, 8 or 16
  int columns;              // of y in a CTA's tile; kGemv: 16, 32 or 64
  int splits;               // parts of the reduction, 1 unless kSplitK
  int stages;               // of the asynchronous copies; kGemv: 0
  int64_t shared_bytes;     // dynamic, a CTA
  int64_t workspace_bytes;  // kSplitK: the partial sums
};

// Steps of the reduction, and what one step of a tile holds in shared memory: x [rows, 64] and W [columns, 64] (or [64,
// columns]) in 16 bits, W twice, and the packed W. Tiles that decode into fragments hold x [rows, 128] alone, and after
// the last step the operands of the low-rank term, x [rows, 64] and W [columns, 64].
inline constexpr int kReductionStep = 64;
struct TileSize {
  int rows;
  int columns;
  int stages;
  bool fragments = false;

  constexpr int step() const { return fragments ? 2 * kReductionStep : kReductionStep; }  // of the reduction
  constexpr int threads() const { return 2 * columns; }
  // CTAs an SM, by registers.
  constexpr int resident() const { return threads() != 128 ? 1 : fragments && rows == 64 ? 3 : 4; }
  constexpr int x_bytes() const { return rows * step() * 2; }
  constexpr int packed_bytes() const { return columns * kReductionStep / 2; }
  constexpr int weight_bytes() const { return columns * kReductionStep * 2; }
  constexpr int shared_bytes() const {
    return !fragments ? stages * (x_bytes() + packed_bytes()) + 2 * weight_bytes()
                      : std::max(stages * x_bytes(), x_bytes() / 2 + weight_bytes());
  }
};
inline constexpr TileSize kTiles[] = {{16, 64, 4},       {32, 64, 4},       {64, 64, 3},      {128, 128, 3},
                                      {16, 64, 3, true}, {32, 64, 3, true}, {64, 64, 2, true}};

// The tile that the launcher takes for a plan of so many rows: 0 to 3 by size.
constexpr const TileSize& tile_of(bool forward, int size) { return kTiles[forward && size < 3 ? 4 + size : size]; }

// Blocks of GGUF are staged as they lie, 256 elements of 16 rows a warp, in units of 16 bytes.
inline constexpr int kGgufStep = 256;  // of K
inline constexpr int kGgufWarps = 4;
inline constexpr int kGgufStages = 2;

// Units of a row that hold a step, wherever between two of them its blocks begin.
constexpr int gguf_chunks(const BlockFormat& format) {
  const int alignment = std::min(16, format.bytes & -format.bytes);
  return (16 - alignment + kGgufStep / format.elements * format.bytes + 15) / 16;
}
constexpr int gguf_pitch(const BlockFormat& format) { return gguf_chunks(format) | 1; }  // rows begin in other banks
constexpr int gguf_staged_bytes(const BlockFormat& format) {                             // a CTA
  return kGgufWarps * kGgufStages * 16 * gguf_pitch(format) * 16;
}

inline constexpr int kGemvTokens = 16;                // the most
inline constexpr int64_t kWorkspaceBytes = 24 << 20;  // the most: fits the L2 cache of the large cards

// Sizes are positive, block_size is one of layout.h. Never fails: what no fused kernel can do is kTwoStep.
MatmulPlan plan_matmul(const MatmulQuestion& question);

// Whether rows of W hold whole blocks and whole steps, and rows of what is multiplied whole vectors.
bool rows_are_regular(int64_t n, int64_t k, int64_t block_size, bool forward);

// Whether a fused kernel takes these sizes at all. The pointers must be at multiples of 16 bytes besides.
bool fused_is_possible(const MatmulQuestion& question);

// Partial sums of kSplitK: fp32 [splits, m, columns of y rounded up to whole tiles].
int64_t split_k_workspace_bytes(int64_t m, int64_t columns, const TileSize& tile, int splits);

}  // namespace qlora_native::cuda
