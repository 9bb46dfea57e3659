// One CTA's tile of y [rows, columns], over the whole reduction or one part of it.
//
// Each step takes 64 of the reduction. x and the packed W come by asynchronous copies, `stages` deep. A thread decodes
// the 32 weights whose 16 bytes it copied itself, once for the CTA, by the exact rule, into 16-bit values in shared
// memory, one step ahead of the MMAs that read them: the two overlap, and a step needs one barrier. Forward, W lies as
// [columns, 64] and ldmatrix reads it; for the input gradient the reduction runs over the rows of W, it lies as [64,
// columns], and ldmatrix.trans reads it. The low-rank term is up to r / 64 more steps of the same product.
#pragma once

#include <cstdint>

#include "cuda/linear_4bit_decode.cuh"
#include "cuda/matmul_plan.h"
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

// kWarpRows x kWarpColumns warps share the tile.
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
  static_assert(kWarpRows * kWarpColumns * 32 == kThreads && kStages >= 3 && kColumnParts % 2 == 0);
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

// Up to 8 consecutive elements of a row of a matrix; zeros beyond it.
template <typename T>
__device__ __forceinline__ uint4 load_eight(const T* matrix,  // [rows, columns]
                                            int64_t row, int64_t column, int64_t rows, int64_t columns) {
  if (row >= rows || column >= columns) {
    return make_uint4(0, 0, 0, 0);
  }
  const T* from = matrix + row * columns + column;
  if (columns % 8 == 0) {
    return wp::load_16(from);
  }
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < columns) {
      words[i / 2] |= static_cast<uint32_t>(from[i].bits) << (i % 2 * 16);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The CTA's part of the job, and its shared memory.
template <typename T, typename Shape, bool kForward>
struct Tile {
  static constexpr int kWeightChunks = kForward ? 8 : Shape::kColumns / 8;  // of 16 bytes in a row of decoded W
  static constexpr int kStageChunks = Shape::kRows * 8;                     // of x
  static constexpr int kBufferChunks = Shape::kThreads * 4;                 // of decoded W

  const TileJob<T>& job;
  int64_t first_row;     // of y
  int64_t first_column;  // of y
  int64_t first_step;
  int steps;
  int split;
  uint4* x;        // [stages][rows][8], swizzled
  uint4* packed;   // [stages][threads]
  uint4* weights;  // [2][kBufferChunks], swizzled

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
    const int64_t all_steps = (job.reduction + kReductionStep - 1) / kReductionStep;
    first_step = all_steps * split / job.splits;
    steps = static_cast<int>(all_steps * (split + 1) / job.splits - first_step);
    x = wp::dyn_smem<uint4>();
    packed = x + Shape::kStages * kStageChunks;
    weights = packed + Shape::kStages * Shape::kThreads;
  }

  __device__ uint4* weight_buffer(int step) const { return weights + step % 2 * kBufferChunks; }

  // The operands of the low-rank term from `from` on, as one step: low in stage 0, up in buffer 0.
  __device__ void load_low_rank(int64_t from) const {
    for (int unit = static_cast<int>(threadIdx.x); unit < kStageChunks; unit += Shape::kThreads) {
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
  int64_t row;      // of W
  bool inside;      // forward: in every step; else: as far as columns go

  static __device__ int tile_row() { return static_cast<int>(threadIdx.x) / kInRow; }
  static __device__ int tile_chunk() { return static_cast<int>(threadIdx.x) % kInRow * 4; }

  __device__ explicit Run(const Owner& tile) {
    const int64_t reduced = tile.first_step * kReductionStep;
    row = (kForward ? tile.first_column : reduced) + tile_row();
    const int64_t column = (kForward ? reduced : tile.first_column) + 8 * tile_chunk();
    inside = kForward ? row < tile.job.columns : column < tile.job.k;
    element = row * tile.job.k + column;
  }

  __device__ bool exists(const TileJob<T>& job) const { return inside && (kForward || row < job.reduction); }

  __device__ void advance(const TileJob<T>& job) {
    element += kForward ? kReductionStep : kReductionStep * job.k;
    row += kForward ? 0 : kReductionStep;
  }

  __device__ StoredScale next_scale(const TileJob<T>& job) {
    const StoredScale stored =
        exists(job) ? stored_scale(job.weight, element >> job.block_shift) : StoredScale{0.0f, -1};
    advance(job);
    return stored;
  }
};

// Starts the copies of one step after another: this thread's units of x, one in every kThreads, and its run of W.
template <typename T, typename Shape, bool kForward>
struct Copies {
  using Owner = Tile<T, Shape, kForward>;
  static constexpr int kUnits = Owner::kStageChunks / Shape::kThreads;
  static constexpr int kRowsApart = Shape::kThreads / 8;
  static_assert(kRowsApart % 8 == 0, "so that all units of a thread are swizzled alike");

  const Owner& tile;
  Run<T, Shape, kForward> run;
  const T* x_from;  // of the first unit in the next step
  int64_t x_column;
  int rows_left;  // of y from the first unit's on
  int x_to;
  int stage = 0;

  __device__ explicit Copies(const Owner& given) : tile(given), run(given) {
    const int row = static_cast<int>(threadIdx.x) / 8;
    const int chunk = static_cast<int>(threadIdx.x) % 8;
    x_to = swizzled<8>(row, chunk);
    x_column = tile.first_step * kReductionStep + 8 * chunk;
    x_from = tile.job.x + (tile.first_row + row) * tile.job.reduction + x_column;
    const int64_t left = tile.job.m - tile.first_row - row;
    rows_left = static_cast<int>(left < Shape::kRows ? left : Shape::kRows);
  }

  __device__ void start_next() {
    const TileJob<T>& job = tile.job;
    uint4* to = tile.x + stage * Owner::kStageChunks + x_to;
    // The reduction is a multiple of 8, forward of 64: a unit is there or not as a whole.
    const bool column_exists = kForward || x_column < job.reduction;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const bool exists = column_exists && unit * kRowsApart < rows_left;
      const T* from = exists ? x_from + unit * kRowsApart * job.reduction : job.x;
      wp::cp_async_16(to + unit * Shape::kThreads, from, exists ? 16 : 0);
    }
    const bool exists = run.exists(job);
    const uint8_t* codes = exists ? job.weight.packed + run.element / 2 : job.weight.packed;
    wp::cp_async_16(tile.packed + stage * Shape::kThreads + threadIdx.x, codes, exists ? 16 : 0);
    run.advance(job);
    x_from += kReductionStep;
    x_column += kReductionStep;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
};

// Decodes this thread's run of one step from its stage into the step's buffer.
template <typename T, typename Shape, bool kForward>
__device__ __forceinline__ void decode_run_of(const Tile<T, Shape, kForward>& tile, int step, int stage,
                                              const float4* levels, float scale) {
  using Own = Run<T, Shape, kForward>;
  const Planes planes = scaled_planes<T>(levels, scale);
  const uint4 codes = tile.packed[stage * Shape::kThreads + static_cast<int>(threadIdx.x)];
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint4* to = tile.weight_buffer(step);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[swizzled<Own::Owner::kWeightChunks>(Own::tile_row(), Own::tile_chunk() + i)] = decode_eight(planes, words[i]);
  }
}

// What one warp adds up: rows and columns of the tile from a first one on.
template <typename T, typename Shape, bool kForward>
struct WarpSums {
  float sums[size_t{Shape::kRowParts}][size_t{Shape::kColumnParts}][4];
  int lane;
  int row;
  int column;

  __device__ WarpSums() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    row = warp % Shape::kWarpsAlongRows * (16 * Shape::kRowParts);
    column = warp / Shape::kWarpsAlongRows * (8 * Shape::kColumnParts);
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

  // 16 of the reduction, the slice-th of a step.
  __device__ __forceinline__ void multiply(const uint4* x,        // [rows][8], swizzled
                                           const uint4* weights,  // [columns][8] or [64][columns / 8], swizzled
                                           int slice) {
    uint32_t a[size_t{Shape::kRowParts}][4];
#pragma unroll
    for (int i = 0; i < Shape::kRowParts; ++i) {
      wp::ldmatrix_x4(a[i], x + swizzled<8>(row + 16 * i + lane % 16, 2 * slice + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Shape::kColumnParts; j += 2) {
      uint32_t two[4];
      if constexpr (kForward) {
        wp::ldmatrix_x4(two,
                        weights + swizzled<8>(column + 8 * j + lane % 8 + lane / 16 * 8, 2 * slice + lane / 8 % 2));
      } else {
        wp::ldmatrix_x4_trans(
            two, weights + swizzled<Shape::kColumns / 8>(16 * slice + lane % 16, column / 8 + j + lane / 16));
      }
      const uint32_t left[2] = {two[0], two[1]};
      const uint32_t right[2] = {two[2], two[3]};
#pragma unroll
      for (int i = 0; i < Shape::kRowParts; ++i) {
        wp::mma_m16n8k16<T>(sums[i][j], a[i], left);
        wp::mma_m16n8k16<T>(sums[i][j + 1], a[i], right);
      }
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

// Up to 8 consecutive elements of a row of y, those that exist.
template <typename T>
__device__ __forceinline__ void store_eight(T* matrix,  // [rows, columns]
                                            int64_t row, int64_t column, int64_t rows, int64_t columns, uint4 values) {
  if (row >= rows || column >= columns) {
    return;
  }
  T* to = matrix + row * columns + column;
  if (columns % 8 == 0) {
    wp::store_16(to, values);
    return;
  }
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < columns) {
      to[i] = T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))};
    }
  }
}

// The finished sums with their bias, rounded, through shared memory into whole vectors of y. Every warp must be done
// with the operands there.
template <typename T, typename Shape, bool kForward>
__device__ __forceinline__ void store_tile(const Tile<T, Shape, kForward>& tile,
                                           const WarpSums<T, Shape, kForward>& warp) {
  constexpr int kChunks = Shape::kColumns / 8;
  constexpr int kPitch = kChunks + 1;  // in units of 16 bytes; the odd one turns rows against the banks
  static_assert(Shape::kRows * kPitch * 16 <= Shape::kSize.shared_bytes());
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
      words[(warp.row + 8 * i + warp.lane / 4) * kPitch * 4 + in_tile / 2] = wp::pack_word<T>(pair);
    }
  }
  __syncthreads();
  const uint4* chunks = wp::dyn_smem<uint4>();
  for (int unit = static_cast<int>(threadIdx.x); unit < Shape::kRows * kChunks; unit += Shape::kThreads) {
    const int row = unit / kChunks;
    const int chunk = unit % kChunks;
    store_eight(job.y, tile.first_row + row, tile.first_column + 8 * chunk, job.m, job.columns,
                chunks[row * kPitch + chunk]);
  }
}

template <typename T, typename Shape, bool kForward>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) linear_4bit_tile_kernel(const TileJob<T> job) {
  constexpr int kSlices = kReductionStep / 16;
  WP_SHARED(float4, levels, 4);
  WP_SHARED(float, nested_code, 256);
  const Tile<T, Shape, kForward> tile(job);
  Copies<T, Shape, kForward> copies(tile);
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    if (step < tile.steps) {
      copies.start_next();
    }
    wp::cp_async_commit();
  }
  if (threadIdx.x < 4) {
    const float* from = job.weight.levels + 4 * threadIdx.x;
    levels[threadIdx.x] = make_float4(from[0], from[1], from[2], from[3]);
  }
  const bool nested = job.weight.absmax == nullptr;
  const float offset = nested ? *job.weight.nested_offset : 0.0f;
  for (int i = static_cast<int>(threadIdx.x); nested && i < 256; i += Shape::kThreads) {
    nested_code[i] = job.weight.nested_code[i];
  }
  Run<T, Shape, kForward> scales(tile);
  const StoredScale first = tile.steps > 0 ? scales.next_scale(job) : StoredScale{0.0f, -1};
  StoredScale stored = tile.steps > 1 ? scales.next_scale(job) : first;
  __syncthreads();
  WarpSums<T, Shape, kForward> warp;
  wp::cp_async_wait<Shape::kStages - 2>();
  if (tile.steps > 0) {
    decode_run_of(tile, 0, 0, levels, scale_of(first, nested_code, offset));
  }

  int stage = 0;
  for (int step = 0; step < tile.steps; ++step) {
    // Behind the barrier the step's operands are complete, and the last step's buffers are free.
    wp::cp_async_wait<Shape::kStages - 3>();
    __syncthreads();
    if (step + Shape::kStages - 1 < tile.steps) {
      copies.start_next();
    }
    wp::cp_async_commit();
    const int next_stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    if (step + 1 < tile.steps) {
      const float scale = scale_of(stored, nested_code, offset);
      if (step + 2 < tile.steps) {
        stored = scales.next_scale(job);
      }
      decode_run_of(tile, step + 1, next_stage, levels, scale);
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      warp.multiply(tile.x + stage * Tile<T, Shape, kForward>::kStageChunks, tile.weight_buffer(step), slice);
    }
    stage = next_stage;
  }

  if (tile.split == 0) {
    for (int64_t from = 0; from < job.r; from += kReductionStep) {
      __syncthreads();
      tile.load_low_rank(from);
      __syncthreads();
      for (int slice = 0; slice < kSlices && from + 16 * slice < job.r; ++slice) {
        warp.multiply(tile.x, tile.weights, slice);
      }
    }
  }
  if (job.partial != nullptr) {
    store_partial(tile, warp);
    return;
  }
  __syncthreads();
  store_tile(tile, warp);
}

}  // namespace qlora_native::cuda
