// y = x W^T for at most 8 tokens, bound by reading W once: y^T = W x^T, so that rows of W fill the 16 rows of the MMA
// and tokens its 8 columns.
//
// A CTA's 8 warps share its rows of W and take turns along K, 128 at a time. Lane 4g + t loads 16 bytes of row g, the
// 32 weights from 32t on, and as many of row g + 8: the order of the reduction is free as long as x follows it. Levels
// go into the MMA unscaled. The 128 weights of a row span two blocks of 64, and those of lanes t < 2 lie in the first:
// columns 0 to 3 of x hold four tokens with zeros in place of the second block, columns 4 to 7 the same four tokens
// with zeros in place of the first. So each lane's sums belong to the one block it loaded from, whose scale it applies
// to them in fp32, and four more tokens are a second MMA with the same weights.
#pragma once

#include <cstdint>

#include "cuda/linear_4bit_decode.cuh"
#include "cuda/matmul_plan.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

template <typename T>
struct SmallJob {
  WeightView weight;  // [n, k], blocks of at least 64
  const T* x;         // [m, k]
  const T* bias;      // [n] or null
  const T* low;       // [m, r]
  const T* up;        // [n, r]
  T* y;               // [m, n]
  int64_t m;          // 1 to 8
  int64_t n;
  int64_t k;  // a multiple of 64
  int64_t r;
  int block_shift;  // log2 of the weight's block size
};

inline constexpr int kSmallThreads = 32 * kGemvWarps;
inline constexpr int kSmallStep = 128;  // of K

// What a lane reads of W in one step: the runs of rows g and g + 8 of each 16. Zeros beyond the edge.
template <int kRowTiles>
struct SmallRuns {
  uint4 codes[size_t{kRowTiles}][2];
};

// The first element of the lane's run in row g (half 0) or g + 8 of the i-th 16 rows; -1 beyond the edge.
template <typename T>
__device__ __forceinline__ int64_t small_element(const SmallJob<T>& job, int64_t first_row, int64_t column, int i,
                                                 int half) {
  const int64_t row = first_row + threadIdx.x % 32 / 4;
  const int further = 16 * i + 8 * half;
  return row + further < job.n && column < job.k ? row * job.k + column + further * job.k : -1;
}

template <int kRowTiles, typename T>
__device__ __forceinline__ SmallRuns<kRowTiles> small_runs(const SmallJob<T>& job, int64_t first_row, int64_t column) {
  SmallRuns<kRowTiles> runs;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int64_t element = small_element(job, first_row, column, i / 2, i % 2);
    runs.codes[i / 2][i % 2] =
        element < 0 ? make_uint4(0, 0, 0, 0) : wp::load_16_streaming(job.weight.packed + element / 2);
  }
  return runs;
}

// The eight elements of x, from 8 * quarter on in its run, that this lane gives to two MMAs for one group of four
// tokens.
template <typename T>
__device__ __forceinline__ uint4 small_tokens(const SmallJob<T>& job, int group, int64_t column, int quarter) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = 4 * group + lane / 4 % 4;
  const bool same_block = (lane < 16) == (lane % 4 < 2);
  const bool inside = same_block && token < job.m && column < job.k;
  return inside ? wp::load_16(job.x + token * job.k + column + 8 * quarter) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint32_t word_of(uint4 vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// A lane's part of the MMAs' results, as wp::mma_m16n8k16 lays it out.
template <int kRowTiles, int kGroups>
struct SmallSums {
  float of[size_t{kRowTiles}][size_t{kGroups}][4] = {};
};

// sums += scale * (levels x^T) of one step.
template <typename T, int kRowTiles, int kGroups>
__device__ __forceinline__ void small_step(const SmallJob<T>& job, const SmallRuns<kRowTiles>& runs, int64_t first_row,
                                           int64_t column, const Planes& planes, SmallSums<kRowTiles, kGroups>& sums) {
  StoredScale scales[size_t{kRowTiles}][2];
  SmallSums<kRowTiles, kGroups> unscaled;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    if (quarter == 1) {  // early enough to hide their latency, late enough to take the registers of codes that are used
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int64_t element = small_element(job, first_row, column, i / 2, i % 2);
        scales[i / 2][i % 2] =
            element < 0 ? StoredScale{0.0f, -1} : stored_scale(job.weight, element >> job.block_shift);
      }
    }
    uint4 tokens[size_t{kGroups}];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      tokens[group] = small_tokens(job, group, column, quarter);
    }
#pragma unroll
    for (int part = 0; part < 2 * kRowTiles; ++part) {
      const int i = part / 2;
      const int half = part % 2;  // of the quarter: 4 weights a lane and row
      uint32_t a[4];
      decode_four(planes, word_of(runs.codes[i][0], quarter) >> 16 * half, a[0], a[2]);
      decode_four(planes, word_of(runs.codes[i][1], quarter) >> 16 * half, a[1], a[3]);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t b[2] = {word_of(tokens[group], 2 * half), word_of(tokens[group], 2 * half + 1)};
        wp::mma_m16n8k16<T>(unscaled.of[i][group], a, b);
      }
    }
  }
  const float offset = job.weight.absmax == nullptr ? *job.weight.nested_offset : 0.0f;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const float upper = scale_of(scales[i][0], job.weight.nested_code, offset);
    const float lower = scale_of(scales[i][1], job.weight.nested_code, offset);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float& sum = sums.of[i][group][part];
        sum = __fmaf_rn(part < 2 ? upper : lower, unscaled.of[i][group][part], sum);
      }
    }
  }
}

// The low-rank term and the bias of one element of y.
template <typename T>
__device__ __forceinline__ float small_addend(const SmallJob<T>& job, int64_t token, int64_t row) {
  float sum = job.bias != nullptr ? widened(job.bias[row]) : 0.0f;
#pragma unroll 8
  for (int64_t i = 0; i < job.r; ++i) {
    sum = __fmaf_rn(widened(job.low[token * job.r + i]), widened(job.up[row * job.r + i]), sum);
  }
  return sum;
}

// 16 * kRowTiles rows of W a CTA, 4 * kGroups tokens.
template <typename T, int kRowTiles, int kGroups>
__global__ void __launch_bounds__(kSmallThreads, 2) linear_4bit_small_kernel(const SmallJob<T> job) {
  constexpr int kRows = 16 * kRowTiles;
  constexpr int kTokens = 4 * kGroups;
  WP_SHARED(float, parts, size_t{kGemvWarps * kTokens * kRows});  // [warp][token][row]
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int run = lane % 4 * 32;

  SmallRuns<kRowTiles> next = small_runs<kRowTiles>(job, first_row, warp * kSmallStep + run);
  Planes planes;
  {
    const float* from = job.weight.levels;
    const float4 levels[4] = {
        make_float4(from[0], from[1], from[2], from[3]), make_float4(from[4], from[5], from[6], from[7]),
        make_float4(from[8], from[9], from[10], from[11]), make_float4(from[12], from[13], from[14], from[15])};
    planes = scaled_planes<T>(levels, 1.0f);
  }

  SmallSums<kRowTiles, kGroups> sums;
  for (int64_t step = warp * kSmallStep; step < job.k; step += kGemvWarps * kSmallStep) {
    const SmallRuns<kRowTiles> runs = next;
    next = small_runs<kRowTiles>(job, first_row, step + kGemvWarps * kSmallStep + run);
    small_step(job, runs, first_row, step + run, planes, sums);
  }

  // Lanes t and t + 2 hold the two blocks' parts of the same tokens: columns 2t and 2t + 1 of each group.
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const float own = sums.of[i][group][part];
        const float sum = own + __shfl_xor_sync(0xffffffffu, own, 2);
        const int row = 16 * i + 8 * (part / 2) + lane / 4;
        const int token = 4 * group + lane % 2 * 2 + part % 2;
        if (lane % 4 < 2) {
          parts[(warp * kTokens + token) * kRows + row] = sum;
        }
      }
    }
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) % kRows;
  const int token = static_cast<int>(threadIdx.x) / kRows;
  if (token < kTokens && token < job.m && first_row + row < job.n) {
    float sum = small_addend(job, token, first_row + row);
#pragma unroll
    for (int from = 0; from < kGemvWarps; ++from) {
      sum += parts[(from * kTokens + token) * kRows + row];
    }
    job.y[token * job.n + first_row + row] = from_float<T>(sum);
  }
}

}  // namespace qlora_native::cuda
