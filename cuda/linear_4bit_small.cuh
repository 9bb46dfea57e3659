// y = x W^T for at most 16 tokens, bound by reading W once: y^T = W x^T, so that rows of W fill the 16 rows of the MMA
// and tokens its 8 columns.
//
// Some warps of a CTA stand beside each other along the rows of W and find x in the L1 cache; the others take turns
// with them along K, 128 at a time. Lane 4g + t loads 16 bytes of row g, the 32 weights from 32t on, and as many of row
// g + 8: the order of the reduction is free as long as x follows it. Levels go into the MMA unscaled, looked up in
// pairs by the bytes of W: a table in shared memory has 32 copies of each pair, one for each lane in a bank of its own,
// so that two weights take one load and the two instructions of its address, without a bank conflict. The 128 weights
// of a row span two blocks of 64, and those of lanes t < 2 lie in the first: columns 0 to 3 of x hold four tokens with
// zeros in place of the second block, columns 4 to 7 the same four tokens with zeros in place of the first. So each
// lane's sums belong to the one block it loaded from, whose scale it applies to them in fp32, and four more tokens are
// one more MMA with the same weights.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "core/layout.h"
#include "core/product.h"
#include "cuda/linear_4bit_decode.cuh"
#include "cuda/matmul_plan.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kSmallRows = 16;                                      // of W, a warp's
inline constexpr int64_t kMostCtas = std::numeric_limits<int32_t>::max();  // of gridDim.x

template <typename T>
struct SmallJob {
  WeightView weight;  // [n, k], in blocks of at least 64, or in a format of GGUF
  const T* x;         // [m, k]
  const T* bias;      // [n] or null
  const T* low;       // [m, r]
  const T* up;        // [n, r]
  T* y;               // [m, n]
  int64_t m;          // 1 to 16
  int64_t n;
  int64_t k;  // a multiple of 64, or of GGUF's block
  int64_t r;
  int block_shift;  // log2 of the weight's block size
  int row_warps;    // warps beside each other along the rows of W
};

inline int block_shift_of(const WeightView& weight) {
  return std::countr_zero(static_cast<uint64_t>(weight.block_size));
}

// rows: of W, a CTA's.
template <typename T>
SmallJob<T> small_job(const ProductJob& product, int rows) {
  return {product.weight,
          static_cast<const T*>(product.x),
          static_cast<const T*>(product.bias),
          static_cast<const T*>(product.low),
          static_cast<const T*>(product.up),
          static_cast<T*>(product.y),
          product.m,
          product.n,
          product.k,
          product.r,
          block_shift_of(product.weight),
          rows / kSmallRows};
}

inline constexpr int kSmallStep = 128;  // of K
inline constexpr int kSmallRun = 32;    // of a step, a lane's in a row

// Sixteen tokens take so many registers that fewer, smaller CTAs share an SM.
constexpr int small_warps(int groups) { return groups > 2 ? 4 : 8; }
constexpr int small_ctas(int groups) { return groups > 2 ? 3 : 2; }  // an SM

inline constexpr int kPairCopies = 32;  // a lane's each; 128 bytes a pair

template <typename T>
__device__ __forceinline__ void small_fill_pairs(const float* levels,  // [16]
                                                 uint4* pairs) {       // [256][kPairCopies / 4]
  for (int byte = static_cast<int>(threadIdx.x); byte < 256; byte += static_cast<int>(blockDim.x)) {
    const float pair[2] = {levels[byte >> 4], levels[byte & 15]};  // the high nibble comes first
    const uint32_t word = wp::pack_word<T>(pair);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // neighbors begin at different banks
      pairs[8 * byte + (i + byte) % 8] = make_uint4(word, word, word, word);
    }
  }
}

// The pair of one of the four bytes of `codes`.
__device__ __forceinline__ uint32_t small_pair(const uint4* pairs, uint32_t codes, int byte, uint32_t lane_bytes) {
  const uint32_t shifted = byte == 0 ? codes << 7 : codes >> (8 * byte - 7);
  const uint32_t offset = (shifted & 0x7f80) | lane_bytes;
  return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(pairs) + offset);
}

// Where a lane reads. Tokens beyond the edge repeat the last one: what comes of them is not stored.
template <typename T, int kGroups>
struct SmallLane {
  LaneRows rows;
  const T* tokens[size_t{kGroups}];  // of x
  bool own_block;                    // whether its column of x^T takes tokens in the block of its run, or zeros

  __device__ SmallLane(const SmallJob<T>& job, int64_t first_row)
      : rows(job.weight, job.n, job.k, job.block_shift, first_row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    own_block = (lane < 16) == (lane % 4 < 2);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t token = 4 * group + lane / 4 % 4;
      tokens[group] = job.x + (token < job.m ? token : job.m - 1) * job.k;
    }
  }

  __device__ __forceinline__ void load_tokens(int column, uint4 (&values)[size_t{kGroups}][4]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        values[group][quarter] = wp::load_16(tokens[group] + column + 8 * quarter);
      }
    }
  }
};

// A lane's part of the MMAs' results, as wp::mma_m16n8k16 lays it out.
template <int kGroups>
struct SmallSums {
  float of[size_t{kGroups}][4] = {};
};

// levels x^T of one step.
template <typename T, int kGroups>
__device__ __forceinline__ SmallSums<kGroups> small_products(const LaneRuns& runs,
                                                             const uint4 (&tokens)[size_t{kGroups}][4],
                                                             const uint4* pairs) {
  const uint32_t lane_bytes = threadIdx.x % 32 * 4;
  SmallSums<kGroups> sums;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const uint32_t upper = word_of(runs.codes[0], quarter);
    const uint32_t lower = word_of(runs.codes[1], quarter);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 4 weights a lane and row, twice
      const uint32_t a[4] = {
          small_pair(pairs, upper, 2 * half, lane_bytes), small_pair(pairs, lower, 2 * half, lane_bytes),
          small_pair(pairs, upper, 2 * half + 1, lane_bytes), small_pair(pairs, lower, 2 * half + 1, lane_bytes)};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint4 four = tokens[group][quarter];
        const uint32_t b[2] = {half == 0 ? four.x : four.z, half == 0 ? four.y : four.w};
        wp::mma_m16n8k16<T>(sums.of[group], a, b);
      }
    }
  }
  return sums;
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

// y of a CTA's rows from a first one on: the parts of all turns, the low-rank term and the bias.
template <typename T, int kWarps, int kTokens>
__device__ __forceinline__ void small_store_y(const SmallJob<T>& job, int64_t cta_row, int cta_rows, int turns,
                                              const float* parts) {  // [kWarps, kTokens, kSmallRows]
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

// 16 * row_warps rows of W a CTA, 4 * kGroups tokens.
template <typename T, int kGroups>
__global__ void __launch_bounds__(32 * small_warps(kGroups), small_ctas(kGroups))
    linear_4bit_small_kernel(const SmallJob<T> job) {
  constexpr int kWarps = small_warps(kGroups);
  constexpr int kTokens = 4 * kGroups;
  WP_SHARED(uint4, pairs, size_t{256 * kPairCopies / 4});
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int turns = kWarps / job.row_warps;
  const int cta_rows = job.row_warps * kSmallRows;
  const int64_t cta_row = static_cast<int64_t>(blockIdx.x) * cta_rows;
  const int run = static_cast<int>(threadIdx.x) % 4 * kSmallRun;
  const int k = static_cast<int>(job.k);
  const int stride = turns * kSmallStep;
  int column = warp / job.row_warps * kSmallStep + run;
  const SmallLane<T, kGroups> lane(job, cta_row + warp % job.row_warps * kSmallRows);

  // Two steps ahead: a warp's loads under way are what hides the latency of memory.
  const int last = k - kSmallRun;
  const int steps = (k + stride - 1) / stride;
  LaneRuns ahead[2] = {lane.rows.runs_of(min(column, last)), lane.rows.runs_of(min(column + stride, last))};
  LaneScales scales_ahead = lane.rows.scales_of(min(column, last));
  const bool nested = job.weight.absmax == nullptr;
  const float offset = nested ? *job.weight.nested_offset : 0.0f;
  small_fill_pairs<T>(job.weight.levels, pairs);
  __syncthreads();

  uint4 tokens[size_t{kGroups}][4] = {};  // stay zeros where the lane loads none
  SmallSums<kGroups> sums;
  for (int step = 0; step < steps; ++step, column += stride) {
    if (lane.own_block) {
      lane.load_tokens(min(column, last), tokens);
    }
    const LaneRuns runs = ahead[0];
    const LaneScales scales = scales_ahead;
    ahead[0] = ahead[1];
    ahead[1] = lane.rows.runs_of(min(column + 2 * stride, last));
    scales_ahead = lane.rows.scales_of(min(column + stride, last));
    const SmallSums<kGroups> unscaled = small_products<T, kGroups>(runs, tokens, pairs);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float level = nested ? job.weight.nested_code[scales.stored[half].code] : 1.0f;
      const float scale = decode_scale(level, scales.stored[half].value, offset);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int part = 2 * half; part < 2 * half + 2; ++part) {
          if (column < k) {  // the last step may end after half: the other lanes' sums are of nothing then
            float& sum = sums.of[group][part];
            sum = __fmaf_rn(scale, unscaled.of[group][part], sum);
          }
        }
      }
    }
  }
  __syncthreads();
  static_assert(kWarps * kTokens * kSmallRows <= 256 * kPairCopies);
  float* parts = reinterpret_cast<float*>(pairs);  // the table has served
  small_store_parts(sums, parts);
  __syncthreads();

  small_store_y<T, kWarps, kTokens>(job, cta_row, cta_rows, turns, parts);
}

}  // namespace qlora_native::cuda
