// y = x W^T for at most 16 tokens, bound by reading W once: y^T = W x^T, so that rows of W fill the 16 rows of the MMA
// and tokens its 8 columns.
//
// Some warps of a CTA stand beside each other along the rows of W and find x in the L1 cache; the others take turns
// with them along K, 128 at a time. Lane 4g + t loads 16 bytes of row g, the 32 weights from 32t on, and as many of row
// g + 8: the order of the reduction is free as long as x follows it. Levels go into the MMA unscaled. The 128 weights
// of a row span two blocks of 64, and those of lanes t < 2 lie in the first: columns 0 to 3 of x hold four tokens with
// zeros in place of the second block, columns 4 to 7 the same four tokens with zeros in place of the first. So each
// lane's sums belong to the one block it loaded from, whose scale it applies to them in fp32, and four more tokens are
// one more MMA with the same weights.
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
  int64_t m;          // 1 to 16
  int64_t n;
  int64_t k;  // a multiple of 64
  int64_t r;
  int block_shift;  // log2 of the weight's block size
  int row_warps;    // warps beside each other along the rows of W
};

inline constexpr int kSmallStep = 128;  // of K
inline constexpr int kSmallRows = 16;   // of W, a warp's

// Sixteen tokens take so many registers that fewer, smaller CTAs share an SM.
constexpr int small_warps(int groups) { return groups > 2 ? 4 : 8; }
constexpr int small_ctas(int groups) { return groups > 2 ? 3 : 2; }  // an SM

// The first element of the lane's run in row g (half 0) or g + 8 (half 1) of its warp's 16; -1 beyond the edge.
template <typename T>
__device__ __forceinline__ int64_t small_element(const SmallJob<T>& job, int64_t first_row, int64_t column, int half) {
  const int64_t row = first_row + 8 * half + threadIdx.x % 32 / 4;
  return row < job.n && column < job.k ? row * job.k + column : -1;
}

// The runs of both rows: what a lane reads of W in one step. Zeros beyond the edge.
struct SmallRuns {
  uint4 codes[2];
};

template <typename T>
__device__ __forceinline__ SmallRuns small_runs(const SmallJob<T>& job, int64_t first_row, int64_t column) {
  SmallRuns runs;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t element = small_element(job, first_row, column, half);
    runs.codes[half] = element < 0 ? make_uint4(0, 0, 0, 0) : wp::load_16_streaming(job.weight.packed + element / 2);
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
template <int kGroups>
struct SmallSums {
  float of[size_t{kGroups}][4] = {};
};

// sums += scale * (levels x^T) of one step.
template <typename T, int kGroups>
__device__ __forceinline__ void small_step(const SmallJob<T>& job, const SmallRuns& runs, int64_t first_row,
                                           int64_t column, const Planes& planes, SmallSums<kGroups>& sums) {
  StoredScale scales[2];
  SmallSums<kGroups> unscaled;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    if (quarter == 1) {  // early enough to hide their latency, late enough to take the registers of codes that are used
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t element = small_element(job, first_row, column, half);
        scales[half] = element < 0 ? StoredScale{0.0f, -1} : stored_scale(job.weight, element >> job.block_shift);
      }
    }
    const uint32_t upper = word_of(runs.codes[0], quarter);
    const uint32_t lower = word_of(runs.codes[1], quarter);
    uint32_t a[2][4];  // 4 weights a lane and row, twice
    decode_four(planes, upper, a[0][0], a[0][2]);
    decode_four(planes, lower, a[0][1], a[0][3]);
    decode_four(planes, upper >> 16, a[1][0], a[1][2]);
    decode_four(planes, lower >> 16, a[1][1], a[1][3]);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint4 tokens = small_tokens(job, group, column, quarter);
      const uint32_t first[2] = {tokens.x, tokens.y};
      const uint32_t second[2] = {tokens.z, tokens.w};
      wp::mma_m16n8k16<T>(unscaled.of[group], a[0], first);
      wp::mma_m16n8k16<T>(unscaled.of[group], a[1], second);
    }
  }
  const float offset = job.weight.absmax == nullptr ? *job.weight.nested_offset : 0.0f;
  const float upper = scale_of(scales[0], job.weight.nested_code, offset);
  const float lower = scale_of(scales[1], job.weight.nested_code, offset);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      float& sum = sums.of[group][part];
      sum = __fmaf_rn(part < 2 ? upper : lower, unscaled.of[group][part], sum);
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

// The sums of all warps: one warp's [token][row] after another's, those of a turn along K beside each other.
template <int kGroups>
__device__ __forceinline__ void small_store_parts(const SmallSums<kGroups>& sums, float* parts) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* own_parts = parts + static_cast<int>(threadIdx.x) / 32 * (4 * kGroups * kSmallRows);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      // Lanes t and t + 2 hold the two blocks' parts of the same tokens.
      const float own = sums.of[group][part];
      const float sum = own + __shfl_xor_sync(0xffffffffu, own, 2);
      const int row = 8 * (part / 2) + lane / 4;
      const int token = 4 * group + lane % 2 * 2 + part % 2;
      if (lane % 4 < 2) {
        own_parts[token * kSmallRows + row] = sum;
      }
    }
  }
}

// 16 * row_warps rows of W a CTA, 4 * kGroups tokens.
template <typename T, int kGroups>
__global__ void __launch_bounds__(32 * small_warps(kGroups), small_ctas(kGroups))
    linear_4bit_small_kernel(const SmallJob<T> job) {
  constexpr int kWarps = small_warps(kGroups);
  constexpr int kTokens = 4 * kGroups;
  WP_SHARED(float, parts, size_t{kWarps * kTokens * kSmallRows});
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int turns = kWarps / job.row_warps;
  const int cta_rows = job.row_warps * kSmallRows;
  const int64_t cta_row = static_cast<int64_t>(blockIdx.x) * cta_rows;
  const int64_t first_row = cta_row + warp % job.row_warps * kSmallRows;
  const int first_step = warp / job.row_warps * kSmallStep;
  const int run = static_cast<int>(threadIdx.x) % 4 * 32;

  // Two steps ahead: a warp's loads under way are what hides the latency of memory.
  SmallRuns ahead[2] = {small_runs(job, first_row, first_step + run),
                        small_runs(job, first_row, first_step + turns * kSmallStep + run)};
  Planes planes;
  {
    const float* from = job.weight.levels;
    const float4 levels[4] = {
        make_float4(from[0], from[1], from[2], from[3]), make_float4(from[4], from[5], from[6], from[7]),
        make_float4(from[8], from[9], from[10], from[11]), make_float4(from[12], from[13], from[14], from[15])};
    planes = scaled_planes<T>(levels, 1.0f);
  }

  SmallSums<kGroups> sums;
  for (int64_t step = first_step; step < job.k; step += turns * kSmallStep) {
    const SmallRuns runs = ahead[0];
    ahead[0] = ahead[1];
    ahead[1] = small_runs(job, first_row, step + 2 * turns * kSmallStep + run);
    small_step(job, runs, first_row, step + run, planes, sums);
  }
  small_store_parts(sums, parts);
  __syncthreads();

  for (int unit = static_cast<int>(threadIdx.x); unit < kTokens * cta_rows; unit += 32 * kWarps) {
    const int row = unit % cta_rows;
    const int token = unit / cta_rows;
    if (token < job.m && cta_row + row < job.n) {
      float sum = small_addend(job, token, cta_row + row);
      const float* part = parts + (row / kSmallRows * kTokens + token) * kSmallRows + row % kSmallRows;
      for (int turn = 0; turn < turns; ++turn) {
        sum += part[turn * job.row_warps * (kTokens * kSmallRows)];
      }
      job.y[token * job.n + cta_row + row] = from_float<T>(sum);
    }
  }
}

}  // namespace qlora_native::cuda
