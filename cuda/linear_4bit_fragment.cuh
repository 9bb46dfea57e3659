// y = x W^T in tiles of up to 64 tokens, whose weights are decoded into the fragments of the MMA that multiplies them:
// y^T = W x^T, as in linear_4bit_small.cuh, with W as it is in linear_4bit_tile.cuh, scaled and rounded by the exact
// rule.
//
// A warp owns 16 rows of W and all tokens of the tile, so that a weight is decoded once, and W takes no shared memory
// and no barrier. A step takes 128 of the reduction. Lane 4g + t loads 16 bytes of row g, the 32 weights from 32t on,
// and as many of row g + 8: those of a run share a block, and the order of the reduction is free as long as x follows
// it. x comes by asynchronous copies; a lane's 16 bytes of a token there are its part of two MMAs, and meet every bank
// once.
//
// The few-token kernel's table of pairs saves 40 cycles of integer instructions per 1,024 weights and costs 16 of
// shared memory, of which the reads of x take 32 to 64: faster by an eighth for 32 tokens, where the decoder binds, and
// slower for 64. It takes 32 KiB, and rounds the scale differently from the tiles.
#pragma once

#include <cstdint>

#include "cuda/linear_4bit_decode.cuh"
#include "cuda/linear_4bit_tile.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

// Four warps beside each other along the rows of W; rows and columns that a warp sums up are those of y^T.
template <int kTile>
struct FragmentShape {
  static constexpr TileSize kSize = kTiles[kTile];
  static constexpr int kRows = kSize.rows;
  static constexpr int kColumns = kSize.columns;
  static constexpr int kStages = kSize.stages;
  static constexpr int kThreads = kSize.threads();
  static constexpr int kRowParts = 1;
  static constexpr int kColumnParts = kRows / 8;
  static constexpr int kWarpsAlongRows = kThreads / 32;
  static constexpr int kResident = kSize.resident();
  static constexpr int kTogether = 1;
};
using Fragments16 = FragmentShape<4>;
using Fragments32 = FragmentShape<5>;
using Fragments64 = FragmentShape<6>;

// As store_partial, of y^T.
template <typename T, typename Shape>
__device__ __forceinline__ void store_fragments(const Tile<T, Shape, true>& tile,
                                                const WarpSums<T, Shape, true>& warp) {
  const TileJob<T>& job = tile.job;
  const int64_t pitch = static_cast<int64_t>(job.column_tiles) * Shape::kColumns;
#pragma unroll
  for (int i = 0; i < 4 * Shape::kColumnParts; ++i) {
    const int64_t token = tile.first_row + i / 4 * 8 + warp.lane % 4 * 2 + i % 2;
    const int64_t column = tile.first_column + warp.row + i % 4 / 2 * 8 + warp.lane / 4;
    if (token < job.m) {
      job.partial[(tile.split * job.m + token) * pitch + column] = warp.sums[0][i / 4][i % 4];
    }
  }
}

// Adds the products of 8 weights a lane of 16 rows with every token of the tile.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_fragments(WarpSums<T, Shape, true>& warp,
                                                   const uint4* x,  // its 8 of the first token
                                                   const uint32_t (&a)[2][4]) {
#pragma unroll
  for (int tokens = 0; tokens < Shape::kColumnParts; ++tokens) {
    const uint4 eight = x[8 * (Shape::kSize.step() / 8) * tokens];
    const uint32_t b[2][2] = {{eight.x, eight.y}, {eight.z, eight.w}};
    wp::mma_m16n8k16<T>(warp.sums[0][tokens], a[0], b[0]);
    wp::mma_m16n8k16<T>(warp.sums[0][tokens], a[1], b[1]);
  }
}

// What follows the last step: the low-rank term, and y or the sums of a part.
template <typename T, typename Shape>
__device__ __forceinline__ void finish_fragments(const Tile<T, Shape, true>& tile, WarpSums<T, Shape, true>& warp) {
  const TileJob<T>& job = tile.job;
  wp::cp_async_wait<0>();
  add_low_rank(tile, warp, tile.weights, tile.x);
  if (job.partial != nullptr) {
    store_fragments(tile, warp);
    return;
  }
  __syncthreads();
  auto* words = wp::dyn_smem<uint16_t>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int in_tile = warp.row + 8 * half + warp.lane / 4;
    const int64_t y_column = tile.first_column + in_tile;
    const float bias = job.bias != nullptr && y_column < job.columns ? widened(job.bias[y_column]) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kColumnParts; ++i) {
      const int token = i / 2 * 8 + warp.lane % 4 * 2 + i % 2;
      words[token * (kTilePitch<Shape> * 8) + in_tile] =
          from_float<T>(warp.sums[0][i / 2][2 * half + i % 2] + bias).bits;
    }
  }
  store_rows(tile);
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) linear_4bit_fragment_kernel(const TileJob<T> job) {
  using Owner = Tile<T, Shape, true>;
  constexpr int kChunks = Owner::kStep / 8;
  static_assert(Shape::kWarpsAlongRows == Shape::kThreads / 32 && Shape::kRowParts == 1);
  WP_SHARED(float4, levels, 4);
  WP_SHARED(float, nested_code, 256);
  const Owner tile(job);
  TokenCopies<T, Shape, true> copies(tile);
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    copies.start_next();
    wp::cp_async_commit();
  }
  WarpSums<T, Shape, true> warp;  // of y^T
  const int run = warp.lane % 4;
  const LaneRows rows(job.weight, job.columns, job.k, job.block_shift, tile.first_column + warp.row);
  const Scales scales(job.weight);
  // The last step may end after half: the other lanes' weights meet zeros in x.
  const int last = static_cast<int>(job.k) - 32;
  int column = static_cast<int>(tile.first_step) * Owner::kStep + 32 * run;
  LaneRuns runs_ahead[2];
  LaneScales scales_ahead[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    runs_ahead[i] = rows.runs_of(min(column + i * Owner::kStep, last));
    scales_ahead[i] = rows.scales_of(min(column + i * Owner::kStep, last));
  }
  fill_tables<Shape::kThreads>(job.weight, levels, nested_code);

  const int x_at = swizzled<kChunks>(warp.lane / 4, 4 * run);
  for (int step = 0; step < tile.steps; ++step) {
    // Behind the barrier the step's x is complete, and the last step's stage is free.
    wp::cp_async_wait<Shape::kStages - 2>();
    __syncthreads();
    copies.start_next();
    wp::cp_async_commit();
    const LaneRuns runs = runs_ahead[0];
    const LaneScales stored = scales_ahead[0];
    runs_ahead[0] = runs_ahead[1];
    scales_ahead[0] = scales_ahead[1];
    runs_ahead[1] = rows.runs_of(min(column + 2 * Owner::kStep, last));
    scales_ahead[1] = rows.scales_of(min(column + 2 * Owner::kStep, last));
    column += Owner::kStep;
    Planes planes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = scales.decoded(stored.stored[half], nested_code);
      scale_planes<T>(levels, scale, 0, planes[half]);
      scale_planes<T>(levels, scale, 1, planes[half]);
    }
    const uint4* x = tile.x + copies.stage * Owner::kStageChunks;  // the oldest: it is overwritten next
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint4 upper = decode_eight(planes[0], word_of(runs.codes[0], word));
      const uint4 lower = decode_eight(planes[1], word_of(runs.codes[1], word));
      const uint32_t a[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
      multiply_fragments<T, Shape>(warp, x + (x_at ^ word), a);
      if (word == 2) {
        wp::scheduling_fence(job.splits, word);  // else the compiler loads more of x at once than registers hold
      }
    }
  }
  finish_fragments(tile, warp);
}

}  // namespace qlora_native::cuda
