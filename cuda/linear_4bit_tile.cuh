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
  static constexpr int kRowParts = kRows / kWarpRows / 16;           // 16-row MMAs a warp
  static constexpr int kColumnParts = kColumns / kWarpColumns / 8;  // 8-column MMAs a warp
  static constexpr int kWarpsAlongRows = kWarpRows;
  static constexpr int kResident = kThreads == 128 ? 4 : 1;  // CTAs an SM, by registers
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
  static constexpr int kRunsInRow = kWeightChunks / 4;

  const TileJob<T>& job;
  int64_t first_row;     // of y
  int64_t first_column;  // of y
  int64_t first_step;
  int steps;
  int split;
  uint4* x;        // [stages][rows][8], swizzled
  uint4* packed;   // [stages][threads]
  uint4* weights;  // [2][threads * 4], swizzled

  // Tiles that run together should share rows of x and rows of W: they come in bands of 8 tiles of rows.
  __device__ explicit Tile(const TileJob<T>& given) : job(given) {
    constexpr int kBand = 8;
    const int band = static_cast<int>(blockIdx.x) / (kBand * job.column_tiles);
    const int within = static_cast<int>(blockIdx.x) % (kBand * job.column_tiles);
    const int height = min(kBand, job.row_tiles - band * kBand);
    first_row = static_cast<int64_t>(band * kBand + within % height) * Shape::kRows;
    first_column = static_cast<int64_t>(within / height) * Shape::kColumns;
    split = static_cast<int>(blockIdx.y);
    const int64_t all_steps = (job.reduction + kReductionStep - 1) / kReductionStep;
    first_step = all_steps * split / job.splits;
    steps = static_cast<int>(all_steps * (split + 1) / job.splits - first_step);
    x = wp::dyn_smem<uint4>();
    packed = x + Shape::kStages * Shape::kRows * 8;
    weights = packed + Shape::kStages * Shape::kThreads;
  }

  __device__ uint4* x_stage(int step) const { return x + step % Shape::kStages * (Shape::kRows * 8); }
  __device__ uint4* own_packed(int step) const {
    return packed + step % Shape::kStages * Shape::kThreads + threadIdx.x;
  }
  __device__ uint4* weight_buffer(int step) const { return weights + step % 2 * (Shape::kThreads * 4); }

  // The run of 32 weights that this thread copies and decodes: its row and first 16-byte unit in the decoded tile.
  static __device__ int run_row() { return static_cast<int>(threadIdx.x) / kRunsInRow; }
  static __device__ int run_chunk() { return static_cast<int>(threadIdx.x) % kRunsInRow * 4; }

  // Its first element in W at a step, or -1 beyond the edge. Rows hold whole runs.
  __device__ int64_t run_element(int step) const {
    const int64_t reduced = (first_step + step) * kReductionStep;
    const int64_t row = (kForward ? first_column : reduced) + run_row();
    const int64_t column = (kForward ? reduced : first_column) + 8 * run_chunk();
    return row < (kForward ? job.columns : job.reduction) && column < job.k ? row * job.k + column : -1;
  }

  __device__ StoredScale run_scale(int step) const {
    const int64_t element = run_element(step);
    return element < 0 ? StoredScale{0.0f, -1} : stored_scale(job.weight, element >> job.block_shift);
  }

  // Starts the copies of one step. The reduction is a multiple of 8, so a unit of x is there or not as a whole.
  __device__ void start_copies(int step) const {
    const int64_t reduced = (first_step + step) * kReductionStep;
    uint4* to = x_stage(step);
#pragma unroll
    for (int unit = static_cast<int>(threadIdx.x); unit < Shape::kRows * 8; unit += Shape::kThreads) {
      const int64_t row = first_row + unit / 8;
      const int64_t column = reduced + unit % 8 * 8;
      const bool inside = row < job.m && column < job.reduction;
      const T* from = inside ? job.x + row * job.reduction + column : job.x;
      wp::cp_async_16(to + swizzled<8>(unit / 8, unit % 8), from, inside ? 16 : 0);
    }
    const int64_t element = run_element(step);
    const uint8_t* codes = element < 0 ? job.weight.packed : job.weight.packed + element / 2;
    wp::cp_async_16(own_packed(step), codes, element < 0 ? 0 : 16);
  }

  __device__ void decode(int step, const float4* levels, float scale) const {
    const Planes planes = scaled_planes<T>(levels, scale);
    const uint4 codes = *own_packed(step);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint4* to = weight_buffer(step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[swizzled<kWeightChunks>(run_row(), run_chunk() + i)] = decode_eight(planes, words[i]);
    }
  }

  // The operands of the low-rank term from `from` on, as one step: low in stage 0, up in buffer 0.
  __device__ void load_low_rank(int64_t from) const {
    for (int unit = static_cast<int>(threadIdx.x); unit < Shape::kRows * 8; unit += Shape::kThreads) {
      x[swizzled<8>(unit / 8, unit % 8)] =
          load_eight(job.low, first_row + unit / 8, from + unit % 8 * 8, job.m, job.r);
    }
    for (int unit = static_cast<int>(threadIdx.x); unit < Shape::kThreads * 4; unit += Shape::kThreads) {
      const int row = unit / kWeightChunks;
      const int chunk = unit % kWeightChunks;
      weights[swizzled<kWeightChunks>(row, chunk)] =
          kForward ? load_eight(job.up, first_column + row, from + chunk * 8, job.columns, job.r)
                   : load_eight(job.up, from + row, first_column + chunk * 8, job.r, job.columns);
    }
  }
};

// What one warp adds up: rows and columns of the tile from a first one on.
template <typename T, typename Shape, bool kForward>
struct WarpSums {
  float sums[Shape::kRowParts][Shape::kColumnParts][4];
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
    uint32_t a[Shape::kRowParts][4];
#pragma unroll
    for (int i = 0; i < Shape::kRowParts; ++i) {
      wp::ldmatrix_x4(a[i], x + swizzled<8>(row + 16 * i + lane % 16, 2 * slice + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Shape::kColumnParts; j += 2) {
      uint32_t two[4];
      if constexpr (kForward) {
        wp::ldmatrix_x4(two, weights + swizzled<8>(column + 8 * j + lane % 8 + lane / 16 * 8,
                                                   2 * slice + lane / 8 % 2));
      } else {
        wp::ldmatrix_x4_trans(two, weights + swizzled<Shape::kColumns / 8>(16 * slice + lane % 16,
                                                                           column / 8 + j + lane / 16));
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

template <typename T>
__device__ __forceinline__ void store_pair(T* to, int64_t column, int64_t columns, float first, float second) {
  const float values[2] = {first, second};
  const uint32_t word = wp::pack_word<T>(values);
  if (columns % 2 == 0) {
    *reinterpret_cast<uint32_t*>(to + column) = word;
    return;
  }
  to[column] = T{static_cast<uint16_t>(word)};
  if (column + 1 < columns) {
    to[column + 1] = T{static_cast<uint16_t>(word >> 16)};
  }
}

// The finished sums with their bias into y, or those of one part into its plane of the workspace.
template <typename T, typename Shape, bool kForward>
__device__ __forceinline__ void store_sums(const Tile<T, Shape, kForward>& tile,
                                           const WarpSums<T, Shape, kForward>& warp) {
  const TileJob<T>& job = tile.job;
  const int64_t pitch = static_cast<int64_t>(job.column_tiles) * Shape::kColumns;
#pragma unroll
  for (int j = 0; j < Shape::kColumnParts; ++j) {
    const int64_t column = tile.first_column + warp.column + 8 * j + warp.lane % 4 * 2;
    float bias[2] = {0.0f, 0.0f};
    if (job.bias != nullptr && job.partial == nullptr) {
      bias[0] = column < job.columns ? widened(job.bias[column]) : 0.0f;
      bias[1] = column + 1 < job.columns ? widened(job.bias[column + 1]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Shape::kRowParts; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = tile.first_row + warp.row + 16 * i + 8 * half + warp.lane / 4;
        const float first = warp.sums[i][j][2 * half];
        const float second = warp.sums[i][j][2 * half + 1];
        if (row < job.m && job.partial != nullptr) {
          float* to = job.partial + (tile.split * job.m + row) * pitch + column;
          *reinterpret_cast<float2*>(to) = make_float2(first, second);
        } else if (row < job.m && column < job.columns) {
          store_pair(job.y + row * job.columns, column, job.columns, first + bias[0], second + bias[1]);
        }
      }
    }
  }
}

template <typename T, typename Shape, bool kForward>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) linear_4bit_tile_kernel(const TileJob<T> job) {
  constexpr int kSlices = kReductionStep / 16;
  WP_SHARED(float4, levels, 4);
  WP_SHARED(float, nested_code, 256);
  const Tile<T, Shape, kForward> tile(job);
  WarpSums<T, Shape, kForward> warp;

#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    if (step < tile.steps) {
      tile.start_copies(step);
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
  __syncthreads();
  StoredScale stored{0.0f, -1};
  if (tile.steps > 0) {
    wp::cp_async_wait<Shape::kStages - 2>();
    tile.decode(0, levels, scale_of(tile.run_scale(0), nested_code, offset));
    stored = tile.steps > 1 ? tile.run_scale(1) : stored;
  }

  for (int step = 0; step < tile.steps; ++step) {
    // Behind the barrier the step's operands are complete, and the last step's buffers are free.
    wp::cp_async_wait<Shape::kStages - 3>();
    __syncthreads();
    if (step + Shape::kStages - 1 < tile.steps) {
      tile.start_copies(step + Shape::kStages - 1);
    }
    wp::cp_async_commit();
    if (step + 1 < tile.steps) {
      const float scale = scale_of(stored, nested_code, offset);
      if (step + 2 < tile.steps) {
        stored = tile.run_scale(step + 2);
      }
      tile.decode(step + 1, levels, scale);
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      warp.multiply(tile.x_stage(step), tile.weight_buffer(step), slice);
    }
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
  store_sums(tile, warp);
}

}  // namespace qlora_native::cuda
