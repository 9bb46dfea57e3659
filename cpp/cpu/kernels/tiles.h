// Products of bf16 matrices by AMX tiles: what the kernels (kernels/gemm-amx-inl.h) are given, and their driver
// (tiles.cc).
//
// A tile register holds 16 rows of 64 bytes. A step multiplies 32 elements of the reduction. Forward products are
// computed transposed, y^T = W x^T, because rows of W as they are stored make the first operand; input gradients
// straight, y = x W, because pairs of rows of W make the second.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/weight_view.h"

namespace qlora_native::cpu {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kTileStep = 32;                     // elements of the reduction
inline constexpr int64_t kTileSize = kTileRows * kTileStep;  // bf16 elements of a tile
inline constexpr int64_t kTileBytes = 2 * kTileSize;
inline constexpr int64_t kTileStrip = 2 * kTileRows;  // output columns that two tiles of the weight make
inline constexpr int64_t kMostColumns = 512;          // of a panel
// A step of a strip in a panel: two tiles, and a gap that keeps what one row of the weight writes in different cache
// sets.
inline constexpr int64_t kPanelStep = 2 * kTileSize + 32;

// A matrix [rows, columns] whose rows are decoded as they are needed: quantized, or dense bf16.
struct TileSource {
  const WeightView* weight;
  const float* scales;  // [blocks] of the weight, decoded
  const Bf16* dense;    // used if weight is null
  int64_t rows;
  int64_t columns;
};

struct TileJob {
  TileSource source;   // forward [width, depth], gradient [depth, width]
  const Bf16* tokens;  // packed part of x, steps [first, last): [groups][last - first][tile]
  int64_t first_step;
  int64_t last_step;
  int64_t steps;    // ceil(depth / 32)
  TileSource up;    // the adapter's second factor, dense: forward [width, r], gradient [r, width]
  const Bf16* low;  // its first, packed like x, or null
  int64_t low_steps;
  const Bf16* bias;  // [width], or null
  float scale;       // of the sums, before the bias
  Bf16* y;           // [m, width]
  int64_t m;
  int64_t width;
};

// Columns [first, last) of y for the groups [first, last) of 16 tokens.
struct TileRange {
  int64_t first_column;
  int64_t last_column;
  int64_t first_group;
  int64_t last_group;
};

struct TileScratch {
  int64_t columns;  // decoded into the panel at once
  int64_t steps;    // of the reduction, likewise: an even number
  Bf16* panel;      // [columns / 32][steps + low_steps][kPanelStep]
  // Sums of unfinished reductions: of all columns if x is packed in parts, else of a panel's, or null where the tile
  // registers hold them all.
  float* partial;
};

struct TileKernels {
  // Groups [first, last) of x [m, width], whose rows lie `stride` apart, into tiles, padded with zeros.
  using Pack = void (*)(const Bf16* x, int64_t m, int64_t width, int64_t stride, int64_t first, int64_t last,
                        Bf16* packed);
  using Product = void (*)(const TileJob& job, const TileRange& range, const TileScratch& scratch);
  // Columns [first, last) of out [r, width] = scale * left^T right, left [m, r], right [m, width].
  using Outer = void (*)(const Bf16* packed_left, int64_t r, const Bf16* right, int64_t m, int64_t width, float scale,
                         int64_t first, int64_t last, float* out);
  Pack pack_forward;
  Pack pack_gradient;
  Product forward;
  Product gradient;
  // left^T in tiles of 16 rows of r by 32 tokens: [ceil(r / 16)][ceil(m / 32)][tile].
  void (*pack_outer)(const Bf16* left, int64_t m, int64_t r, Bf16* packed);
  Outer outer;
};

// A matrix as the driver takes it: quantized, or dense bf16 where weight is null.
struct TileMatrix {
  const WeightView* weight;
  const Bf16* dense;
  int64_t rows;
  int64_t columns;
};

// One product on tokens [m, depth]; for the gradient, depth is matrix.rows and the columns of y are matrix.columns.
struct TileProduct {
  bool forward;
  TileMatrix matrix;
  const Bf16* x;     // [m, depth]
  const Bf16* bias;  // [width], forward only, or null
  const Bf16* low;   // [m, r], or null
  const Bf16* up;    // forward [width, r], gradient [r, width]
  int64_t r;
  Bf16* y;  // [m, width]
  int64_t m;
  const Bf16* down;  // forward [r, depth], gradient [depth, r]: low is made here, into made_low; or null
  Bf16* made_low;    // [m, r]
  float down_scale;  // its sums are multiplied by this before they are rounded
};

bool have_tiles();
int64_t tile_product_scratch_bytes(const TileProduct& product);
void tile_product(const TileProduct& product, unsigned char* scratch);  // scratch: aligned to 64 bytes

// Columns [first, last) of y on the calling thread, `first` a multiple of kTileStrip, with the same bits; none of them
// where only low is to be made.
int64_t tile_part_scratch_bytes(const TileProduct& product, int64_t columns);
void tile_part(const TileProduct& product, int64_t first, int64_t last, unsigned char* scratch);

// out [r, width] = scale * left^T right in fp32; left [m, r], right [m, width].
int64_t tile_outer_scratch_bytes(int64_t m, int64_t r);
void tile_outer(const Bf16* left, const Bf16* right, int64_t m, int64_t r, int64_t width, float scale, float* out,
                unsigned char* scratch);
void tile_outer_part(const Bf16* left, const Bf16* right, int64_t m, int64_t r, int64_t width, float scale,
                     int64_t first, int64_t last, float* out, unsigned char* scratch);

}  // namespace qlora_native::cpu
