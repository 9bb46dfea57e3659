// One CTA's tile of y [rows, columns], over the whole reduction or one part of it: the input gradient, and forward more
// than 64 tokens (linear_4bit_fragment.cuh has the others).
//
// Each step takes 64 of the reduction. x and the packed W come by asynchronous copies, `stages` deep. A thread decodes
// the 32 weights whose 16 bytes it copied, once for the CTA, by the exact rule, into 16-bit values in shared memory,
// one step ahead of the MMAs that read them, so that a step needs one barrier. A warp issues its instructions in order:
// the next step's work stands between the MMAs of this one, a piece at a time, and without branches, which the compiler
// would not move MMAs across. Forward, W lies as [columns, 64] for ldmatrix; for the input gradient, which reduces over
// the rows of W, as [64, columns] for ldmatrix.trans. The low-rank term is up to r / 64 more steps of the same product.
#pragma once

#include <cstdint>

#include "cuda/linear_4bit_decode.cuh"
#include "cuda/matmul_plan.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

template <typename T>
struct TileJob {
  WeightView weight;  // [n, k]
  const T* x;         // [m, reduction]
  const T* bias;      // [columns] or null
  const T* low;       // [m, r]
  const T* up;        // forward [columns, r], else [r, columns]
  T* y;               // [m, columns]
  float* partial;     // [splits, m, column_tiles * tile columns], or null with one split
  int64_t m;
  int64_t k;          // of W
  int64_t reduction;  // forward k, else n
  int64_t columns;    // of y: forward n, else k
  int64_t r;
  int block_shift;  // log2 of the weight's block size
  int splits;
  int row_tiles;
  int column_tiles;
};

// kWarpRows x kWarpColumns warps share the tile. kTogether steps are never in two parts of the reduction.
template <int kTile, int kWarpRows, int kWarpColumns>
struct TileShape {
  static constexpr TileSize kSize = kTiles[kTile];
  static constexpr int kRows = kSize.rows;
  static constexpr int kColumns = kSize.columns;
  static constexpr int kStages = kSize.stages;
  static constexpr int kThreads = kSize.threads();
  static constexpr int kRowParts = kRows / kWarpRows / 16;          // 16-row MMAs a warp
  static constexpr int kColumnParts = kColumns / kWarpColumns / 8;  // 8-column MMAs a warp
  static constexpr int kWarpsAlongRows = kWarpRows;
  static constexpr int kResident = kSize.resident();
  static constexpr int kTogether = 1;
  static_assert(kWarpRows * kWarpColumns * 32 == kThreads && kColumnParts % 2 == 0);
};
using Tile16 = TileShape<0, 1, 4>;
using Tile32 = TileShape<1, 1, 4>;
using Tile64 = TileShape<2, 2, 2>;
using Tile128 = TileShape<3, 2, 4>;

// Where 8 elements of a tile lie, in units of 16 bytes, in rows of kChunks such units. A quarter warp that stores the
// runs it decoded, and the eight rows that ldmatrix reads, meet every bank once.
template <int kChunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(kChunks == 8 || kChunks == 16);
  return row * kChunks + (chunk ^ (row & 7) ^ (chunk & 8) >> 2);
}

// The CTA's part of the job, and its shared memory.
template <typename T, typename Shape, bool kForward>
struct Tile {
  static constexpr int kStep = Shape::kSize.step();                         // of the reduction
  static constexpr int kWeightChunks = kForward ? 8 : Shape::kColumns / 8;  // of 16 bytes in a row of decoded W
  static constexpr int kStageChunks = Shape::kRows * (kStep / 8);           // of x
  static constexpr int kBufferChunks = Shape::kThreads * 4;                 // of decoded W

  const TileJob<T>& job;
  int64_t first_row;     // of y
  int64_t first_column;  // of y
  int64_t first_step;
  int steps;
  int split;
  uint4* x;        // [stages][rows][kStep / 8], swizzled
  uint4* packed;   // [stages][threads]
  uint4* weights;  // [2][kBufferChunks], swizzled; into fragments: one buffer, of the low-rank term, over the stages

  // Tiles that run together should share rows of x and rows of W: they come in bands of 8 tiles of rows.
  __device__ explicit Tile(const TileJob<T>& given) : job(given) {
    constexpr int kBand = 8;
    const int64_t in_band = static_cast<int64_t>(kBand) * job.column_tiles;
    const int band = static_cast<int>(blockIdx.x / in_band);
    const int within = static_cast<int>(blockIdx.x % in_band);
    const int height = min(kBand, job.row_tiles - band * kBand);
    first_row = static_cast<int64_t>(band * kBand + within % height) * Shape::kRows;
    first_column = static_cast<int64_t>(within / height) * Shape::kColumns;
    split = static_cast<int>(blockIdx.y);
    const int64_t units = (job.reduction + kStep * Shape::kTogether - 1) / (kStep * Shape::kTogether);
    first_step = units * split / job.splits * Shape::kTogether;
    steps = static_cast<int>(units * (split + 1) / job.splits * Shape::kTogether - first_step);
    x = wp::dyn_smem<uint4>();
    packed = x + Shape::kStages * kStageChunks;
    weights = Shape::kSize.fragments ? x + Shape::kRows * 8 : packed + Shape::kStages * Shape::kThreads;
  }

  // How many steps of the reduction reach an index that the first step has at `first`.
  __device__ int steps_inside(int64_t first) const {
    const int64_t inside = (job.reduction - first + kStep - 1) / kStep;
    return static_cast<int>(inside < steps ? inside : steps);
  }

  __device__ uint4* weight_buffer(int step) const { return weights + step % 2 * kBufferChunks; }

  // The operands of the low-rank term from `from` on, as one step: low in stage 0, up in buffer 0.
  __device__ void load_low_rank(int64_t from) const {
    for (int unit = static_cast<int>(threadIdx.x); unit < Shape::kRows * 8; unit += Shape::kThreads) {
      x[swizzled<8>(unit / 8, unit % 8)] = load_eight(job.low, first_row + unit / 8, from + unit % 8 * 8, job.m, job.r);
    }
    for (int unit = static_cast<int>(threadIdx.x); unit < kBufferChunks; unit += Shape::kThreads) {
      const int row = unit / kWeightChunks;
      const int chunk = unit % kWeightChunks;
      weights[swizzled<kWeightChunks>(row, chunk)] =
          kForward ? load_eight(job.up, first_column + row, from + chunk * 8, job.columns, job.r)
                   : load_eight(job.up, from + row, first_column + chunk * 8, job.r, job.columns);
    }
  }
};

// The run of 32 weights that this thread copies and decodes in each step. Rows hold whole runs.
template <typename T, typename Shape, bool kForward>
struct Run {
  using Owner = Tile<T, Shape, kForward>;
  static constexpr int kInRow = Owner::kWeightChunks / 4;

  int64_t element;  // of W, the run's first in the next step
  int steps_left;   // in which it exists

  static __device__ int tile_row() { return static_cast<int>(threadIdx.x) / kInRow; }
  static __device__ int tile_chunk() { return static_cast<int>(threadIdx.x) % kInRow * 4; }

  __device__ explicit Run(const Owner& tile) {
    const int64_t reduced = tile.first_step * kReductionStep;
    const int64_t row = (kForward ? tile.first_column : reduced) + tile_row();
    const int64_t column = (kForward ? reduced : tile.first_column) + 8 * tile_chunk();
    const bool inside = kForward ? row < tile.job.columns : column < tile.job.k;
    element = row * tile.job.k + column;
    steps_left = !inside ? 0 : kForward ? tile.steps : tile.steps_inside(row);
  }

  __device__ void advance(const TileJob<T>& job) {
    element += kForward ? kReductionStep : kReductionStep * job.k;
    --steps_left;
  }

  // That of any block where the run does not exist: its weights meet zeros in x, or make columns that nobody stores.
  __device__ StoredScale next_scale(const TileJob<T>& job, const Scales& scales) {
    const StoredScale stored = scales.stored(steps_left > 0 ? element >> job.block_shift : 0);
    advance(job);
    return stored;
  }
};

// Starts the copies of x of one step after another: this thread's units of 16 bytes, one in every kThreads.
template <typename T, typename Shape, bool kForward>
struct TokenCopies {
  using Owner = Tile<T, Shape, kForward>;
  static constexpr int kUnits = Owner::kStageChunks / Shape::kThreads;
  static constexpr int kChunks = Owner::kStep / 8;  // in a row
  static constexpr int kRowsApart = Shape::kThreads / kChunks;
  static_assert(kRowsApart % 8 == 0, "so that all units of a thread are swizzled alike");

  const Owner& tile;
  const T* from;  // the first unit, in the next step
  int64_t apart;  // from one unit to the next
  int to;
  int rows_left;   // of x, from that unit's on, or 0 beyond the last step
  int steps_left;  // in which these units exist: the reduction is a multiple of 8
  int stage = 0;

  __device__ explicit TokenCopies(const Owner& given) : tile(given) {
    const int row = static_cast<int>(threadIdx.x) / kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int64_t column = tile.first_step * Owner::kStep + 8 * chunk;
    from = tile.job.x + (tile.first_row + row) * tile.job.reduction + column;
    to = swizzled<kChunks>(row, chunk);
    steps_left = tile.steps_inside(column);
    const int rows = static_cast<int>(min(tile.job.m - tile.first_row, int64_t{Shape::kRows}));
    rows_left = steps_left > 0 ? rows - row : 0;
    apart = rows_left > 0 ? kRowsApart * tile.job.reduction : 0;  // a register: else a product in every step
  }

  // Zeros beyond the last row and the last step, where a copy reads nothing.
  __device__ void start_next() {
    const T* at = from;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      wp::cp_async_16(tile.x + stage * Owner::kStageChunks + to + unit * Shape::kThreads, at,
                      unit * kRowsApart < rows_left ? 16 : 0);
      at += apart;
    }
    from += Owner::kStep;
    --steps_left;
    rows_left = steps_left > 0 ? rows_left : 0;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
};

// And those of its run of W.
template <typename T, typename Shape, bool kForward>
struct Copies : TokenCopies<T, Shape, kForward> {
  using Tokens = TokenCopies<T, Shape, kForward>;
  using Tokens::stage;
  using Tokens::tile;

  Run<T, Shape, kForward> run;
  const uint8_t* codes_from;

  __device__ explicit Copies(const Tile<T, Shape, kForward>& given)
      : Tokens(given), run(given), codes_from(tile.job.weight.packed + (run.steps_left > 0 ? run.element / 2 : 0)) {}

  // Beyond the last step the address stays at it.
  __device__ void start_next() {
    wp::cp_async_16(tile.packed + stage * Shape::kThreads + threadIdx.x, codes_from, run.steps_left > 0 ? 16 : 0);
    codes_from += run.steps_left > 1 ? (kForward ? 1 : tile.job.k) * (kReductionStep / 2) : 0;
    --run.steps_left;
    Tokens::start_next();
  }
};

// The work of a step for the one after it, in pieces that stand between its MMAs.
template <typename T, typename Shape, bool kForward>
struct Ahead {
  using Own = Run<T, Shape, kForward>;
  static constexpr int kPieces = 8;

  const Tile<T, Shape, kForward>& tile;
  const float4* levels;      // [4] in shared memory
  const float* nested_code;  // [256] there
  Copies<T, Shape, kForward>& copies;
  Own run;
  Scales scales;
  StoredScale stored;  // of the step after it
  float scale;
  Planes planes;  // of the step that is decoded next
  uint4 codes;    // of that step

  __device__ Ahead(const Tile<T, Shape, kForward>& given, const float4* given_levels, const float* given_code,
                   Copies<T, Shape, kForward>& given_copies)
      : tile(given),
        levels(given_levels),
        nested_code(given_code),
        copies(given_copies),
        run(given),
        scales(given.job.weight),
        stored(run.next_scale(given.job, scales)) {}

  __device__ __forceinline__ void next_scale() {
    scale = scales.decoded(stored, nested_code);
    stored = run.next_scale(tile.job, scales);
  }

  __device__ __forceinline__ void next_planes() {
    next_scale();
    scale_planes<T>(levels, scale, 0, planes);
    scale_planes<T>(levels, scale, 1, planes);
  }

  // The word-th eight weights of this thread's run of `step`, from its stage into the step's buffer, in their order.
  __device__ __forceinline__ void decode(int word, int step, int stage) {
    if (word == 0) {
      codes = tile.packed[stage * Shape::kThreads + static_cast<int>(threadIdx.x)];
    }
    tile.weight_buffer(step)[swizzled<Own::Owner::kWeightChunks>(Own::tile_row(), Own::tile_chunk() + word)] =
        decode_eight(planes, word_of(codes, word));
  }

  __device__ __forceinline__ void work(int piece, int step, int stage) {
    if (piece == 0) {
      copies.start_next();
      wp::cp_async_commit();
    } else if (piece < 5) {
      decode(piece - 1, step, stage);
    } else if (piece == 5) {
      next_scale();
    } else {
      scale_planes<T>(levels, scale, piece - 6, planes);
    }
  }
};

// What one warp adds up: rows and columns of the tile from a first one on.
template <typename T, typename Shape, bool kForward>
struct WarpSums {
  static constexpr int kBeats = Shape::kColumnParts / 2;

  float sums[size_t{Shape::kRowParts}][size_t{Shape::kColumnParts}][4];
  int lane;
  int row;
  int column;
  int x_at;  // where the lane's address of x for ldmatrix lies in slice 0
  int weights_at[size_t{kForward ? 1 : kBeats}];

  __device__ WarpSums() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    row = warp % Shape::kWarpsAlongRows * (16 * Shape::kRowParts);
    column = warp / Shape::kWarpsAlongRows * (8 * Shape::kColumnParts);
    x_at = swizzled<8>(row + lane % 16, lane / 16);
    if constexpr (kForward) {
      weights_at[0] = swizzled<8>(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    } else {
#pragma unroll
      for (int beat = 0; beat < kBeats; ++beat) {
        weights_at[beat] = swizzled<Shape::kColumns / 8>(lane % 16, column / 8 + 2 * beat + lane / 16);
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kRowParts; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kColumnParts; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          sums[i][j][part] = 0.0f;
        }
      }
    }
  }

  // 16 of the reduction, the slice-th of a step, in kBeats parts; between(i) is called after each. In rows of 8 chunks
  // the slice is an exclusive or in the address, as swizzling is.
  template <typename Between>
  __device__ __forceinline__ void multiply(const uint4* x,        // [rows][8], swizzled
                                           const uint4* weights,  // [columns][8] or [64][columns / 8], swizzled
                                           int slice, Between between) {
    uint32_t a[size_t{Shape::kRowParts}][4];
#pragma unroll
    for (int i = 0; i < Shape::kRowParts; ++i) {
      wp::ldmatrix_x4(a[i], x + (x_at ^ 2 * slice) + 16 * 8 * i);
    }
#pragma unroll
    for (int beat = 0; beat < kBeats; ++beat) {
      const int j = 2 * beat;
      uint32_t two[4];
      if constexpr (kForward) {
        wp::ldmatrix_x4(two, weights + (weights_at[0] ^ 2 * slice) + 8 * 8 * j);
      } else {
        wp::ldmatrix_x4_trans(two, weights + weights_at[beat] + 16 * slice * (Shape::kColumns / 8));
      }
      const uint32_t left[2] = {two[0], two[1]};
      const uint32_t right[2] = {two[2], two[3]};
#pragma unroll
      for (int i = 0; i < Shape::kRowParts; ++i) {
        wp::mma_m16n8k16<T>(sums[i][j], a[i], left);
        wp::mma_m16n8k16<T>(sums[i][j + 1], a[i], right);
      }
      between(beat);
    }
  }
};

// The sums of one part of the reduction into its plane of the workspace.
template <typename T, typename Shape, bool kForward>
__device__ __forceinline__ void store_partial(const Tile<T, Shape, kForward>& tile,
                                              const WarpSums<T, Shape, kForward>& warp) {
  const TileJob<T>& job = tile.job;
  const int64_t pitch = static_cast<int64_t>(job.column_tiles) * Shape::kColumns;
#pragma unroll
  for (int i = 0; i < 2 * Shape::kRowParts; ++i) {
    const int64_t row = tile.first_row + warp.row + 8 * i + warp.lane / 4;
    float* to = job.partial + (tile.split * job.m + row) * pitch + tile.first_column + warp.column + warp.lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < Shape::kColumnParts; ++j) {
      const float* sums = warp.sums[i / 2][j] + i % 2 * 2;
      if (row < job.m) {
        *reinterpret_cast<float2*>(to + 8 * j) = make_float2(sums[0], sums[1]);
      }
    }
  }
}

// Of a finished row of y in shared memory, in units of 16 bytes; the odd one turns rows against the banks.
template <typename Shape>
inline constexpr int kTilePitch = Shape::kColumns / 8 + 1;

// Rows of y from shared memory, in whole vectors.
template <typename T, typename Shape, bool kForward>
__device__ __forceinline__ void store_rows(const Tile<T, Shape, kForward>& tile) {
  constexpr int kChunks = Shape::kColumns / 8;
  static_assert(Shape::kRows * kTilePitch<Shape> * 16 <= Shape::kSize.shared_bytes());
  const TileJob<T>& job = tile.job;
  __syncthreads();
  const uint4* chunks = wp::dyn_smem<uint4>();
  for (int unit = static_cast<int>(threadIdx.x); unit < Shape::kRows * kChunks; unit += Shape::kThreads) {
    const int row = unit / kChunks;
    const int chunk = unit % kChunks;
    store_eight(job.y, tile.first_row + row, tile.first_column + 8 * chunk, job.m, job.columns,
                chunks[row * kTilePitch<Shape> + chunk]);
  }
}

// The finished sums with their bias, rounded, through shared memory into whole vectors of y. Every warp must be done
// with the operands there.
template <typename T, typename Shape, bool kForward>
__device__ __forceinline__ void store_tile(const Tile<T, Shape, kForward>& tile,
                                           const WarpSums<T, Shape, kForward>& warp) {
  const TileJob<T>& job = tile.job;
  uint32_t* words = wp::dyn_smem<uint32_t>();
#pragma unroll
  for (int j = 0; j < Shape::kColumnParts; ++j) {
    const int in_tile = warp.column + 8 * j + warp.lane % 4 * 2;
    const int64_t column = tile.first_column + in_tile;
    const bool biased = job.bias != nullptr;
    const float left = biased && column < job.columns ? widened(job.bias[column]) : 0.0f;
    const float right = biased && column + 1 < job.columns ? widened(job.bias[column + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kRowParts; ++i) {
      const float* sums = warp.sums[i / 2][j] + i % 2 * 2;
      const float pair[2] = {sums[0] + left, sums[1] + right};
      words[(warp.row + 8 * i + warp.lane / 4) * kTilePitch<Shape> * 4 + in_tile / 2] = wp::pack_word<T>(pair);
    }
  }
  store_rows(tile);
}

// The low-rank term, when no copy is under way any more; `left` times `right` is what the warp sums up.
template <typename T, typename Shape, bool kForward>
__device__ __forceinline__ void add_low_rank(const Tile<T, Shape, kForward>& tile, WarpSums<T, Shape, kForward>& warp,
                                             const uint4* left, const uint4* right) {
  if (tile.split != 0) {
    return;
  }
  for (int64_t from = 0; from < tile.job.r; from += kReductionStep) {
    __syncthreads();
    tile.load_low_rank(from);
    __syncthreads();
#pragma unroll 1
    for (int slice = 0; slice < kReductionStep / 16 && from + 16 * slice < tile.job.r; ++slice) {
      warp.multiply(left, right, slice, [](int) {});
    }
  }
}

template <typename T, typename Shape, bool kForward>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) linear_4bit_tile_kernel(const TileJob<T> job) {
  using Owner = Tile<T, Shape, kForward>;
  using Work = Ahead<T, Shape, kForward>;
  using Warp = WarpSums<T, Shape, kForward>;
  constexpr int kSlices = kReductionStep / 16;
  constexpr int kEach = Work::kPieces / (kSlices * Warp::kBeats);  // pieces of work between MMAs
  static_assert(Shape::kStages >= 3);
  WP_SHARED(float4, levels, 4);
  WP_SHARED(float, nested_code, 256);
  const Tile<T, Shape, kForward> tile(job);
  Copies<T, Shape, kForward> copies(tile);
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    copies.start_next();
    wp::cp_async_commit();
  }
  fill_tables<Shape::kThreads>(job.weight, levels, nested_code);
  Work ahead(tile, levels, nested_code, copies);
  __syncthreads();
  Warp warp;
  wp::cp_async_wait<Shape::kStages - 2>();
  ahead.next_planes();
  for (int word = 0; word < 4; ++word) {
    ahead.decode(word, 0, 0);
  }
  ahead.next_planes();

  int stage = 0;
  for (int step = 0; step < tile.steps; ++step) {
    // Behind the barrier the step's operands are complete, and the last step's buffers are free.
    wp::cp_async_wait<Shape::kStages - 3>();
    __syncthreads();
    const int next_stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      warp.multiply(tile.x + stage * Owner::kStageChunks, tile.weight_buffer(step), slice, [&](int beat) {
        const int first = (slice * Warp::kBeats + beat) * kEach;
#pragma unroll
        for (int piece = first; piece < first + kEach; ++piece) {
          ahead.work(piece, step + 1, next_stage);
        }
        if (first + kEach < Work::kPieces) {
          wp::scheduling_fence(job.splits, first);
        }
      });
    }
    stage = next_stage;
  }
  wp::cp_async_wait<0>();
  add_low_rank(tile, warp, tile.x, tile.weights);
  if (job.partial != nullptr) {
    store_partial(tile, warp);
    return;
  }
  __syncthreads();
  store_tile(tile, warp);
}

}  // namespace qlora_native::cuda
