// Root-mean-square norms: a sum over each row, then a sweep over it, with the arithmetic of
// cpu/kernels/activations-inl.h.
//
// Rows come to shared memory by asynchronous copies and are read from there twice; the weight, once a thread block.
// Sixteen threads take the sum of a row, in the order of the CPU op: running sum i has elements i, i + 16, ..., and the
// sixteen are added by halves. That chain of a row is as long as its width / 16 additions, about as many cycles as a
// multiprocessor's share of the memory needs for the row; other blocks of the multiprocessor fill the wait.
//
// Rows that do not fit, or do not lie at multiples of 16 bytes, are read from device memory twice, by elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/elementwise.cuh"
#include "cuda/grid.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kSumLanes = 16;  // threads that take the sum of a row
inline constexpr int kMostRows = kRowThreads / kSumLanes;

struct RowFactors {
  float rstd;
  float mean;  // of the gradient's products; backward alone
};

// y = w * round(x / rms(x)).
struct RmsNorm {
  static constexpr int kInputs = 1;
  float eps;
  float* rstd;  // [rows]

  __device__ __forceinline__ RowFactors begin(int64_t) const { return {0.0f, 0.0f}; }
  __device__ __forceinline__ float term(const float (&in)[1], float, const RowFactors&) const { return in[0] * in[0]; }
  __device__ __forceinline__ RowFactors end(int64_t row, float mean, RowFactors) const {
    const float root = 1.0f / sqrtf(mean + eps);
    rstd[row] = root;
    return {root, 0.0f};
  }
  template <typename T, size_t kCount>
  __device__ __forceinline__ void sweep(const float (&in)[1][kCount], const float (&w)[kCount], const RowFactors& by,
                                        float (&out)[kCount]) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      out[i] = in[0][i] * by.rstd;
    }
    round_to<T>(out);
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      out[i] *= w[i];
    }
  }
};

// grad_x = rstd * (g - n * mean(g n)) with g = grad_y * weight, n = x * rstd. in: x, grad_y.
struct RmsNormGrad {
  static constexpr int kInputs = 2;
  const float* rstd;  // [rows]

  __device__ __forceinline__ RowFactors begin(int64_t row) const { return {rstd[row], 0.0f}; }
  __device__ __forceinline__ float term(const float (&in)[2], float w, const RowFactors& by) const {
    return (in[1] * w) * (in[0] * by.rstd);
  }
  __device__ __forceinline__ RowFactors end(int64_t, float mean, RowFactors by) const { return {by.rstd, mean}; }
  template <typename T, size_t kCount>
  __device__ __forceinline__ void sweep(const float (&in)[2][kCount], const float (&w)[kCount], const RowFactors& by,
                                        float (&out)[kCount]) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      out[i] = by.rstd * (in[1][i] * w[i] - (in[0][i] * by.rstd) * by.mean);
    }
  }
};

// The sum over a row, to all sixteen threads. Called by whole warps; a lane with nothing to add has begin = end.
template <typename T, int kUnroll, typename Rule>
__device__ __forceinline__ float sum_of_row(const T* const (&in)[Rule::kInputs],  // [width] each
                                            const T* weight,                      // [width]
                                            int begin, int end, const RowFactors& by, const Rule& rule) {
  float sum = 0.0f;
#pragma unroll kUnroll
  for (int i = begin; i < end; i += kSumLanes) {
    float values[Rule::kInputs];
#pragma unroll
    for (int j = 0; j < Rule::kInputs; ++j) {
      values[j] = widened(in[j][i]);
    }
    sum += rule.term(values, widened(weight[i]), by);
  }
#pragma unroll
  for (int offset = kSumLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  return sum;
}

// A thread block takes kRowThreads / threads rows at a time, `threads` of it one row: a power of two from kSumLanes on.
// Shared memory: RowFactors [kMostRows] and, if kStaged, T [1 + kInputs * rows at a time, width].
template <typename T, bool kStaged, typename Rule>
__global__ void __launch_bounds__(kRowThreads)
    row_kernel(const Arrays<const T*, Rule::kInputs> in,  // [rows, width] each
               const T* __restrict__ weight,              // [width]
               int64_t rows, int width, int threads, Rule rule,
               T* __restrict__ out) {  // [rows, width]
  constexpr int kInputs = Rule::kInputs;
  constexpr int kGroup = kStaged ? kPerVector<T> : 1;
  const auto thread = static_cast<int>(threadIdx.x);
  const int group = thread / threads;
  const int member = thread % threads;
  const int64_t at_a_time = kRowThreads / threads;
  auto* factors = wp::dyn_smem<RowFactors>();
  const T* w = weight;
  T* staged = nullptr;  // of this group
  if constexpr (kStaged) {
    auto* shared = reinterpret_cast<T*>(factors + kMostRows);
    staged = shared + (1 + group * kInputs) * width;
    for (int i = thread * kGroup; i < width; i += kRowThreads * kGroup) {
      wp::cp_async_16(shared + i, weight + i);
    }
    w = shared;
  }
  for (int64_t first = blockIdx.x * at_a_time; first < rows; first += gridDim.x * at_a_time) {
    const int64_t row = first + group;
    const int count = row < rows ? width : 0;
    const T* source[kInputs];
#pragma unroll
    for (int j = 0; j < kInputs; ++j) {
      source[j] = in.at[j] + row * width;
      if constexpr (kStaged) {
        for (int i = member * kGroup; i < count; i += threads * kGroup) {
          wp::cp_async_16(staged + j * width + i, source[j] + i);
        }
        source[j] = staged + j * width;
      }
    }
    wp::cp_async_commit();
    wp::cp_async_wait<0>();
    __syncthreads();  // the rows are there, and the last rows' factors have been read
    if (member < 32) {
      const RowFactors by = count > 0 ? rule.begin(row) : RowFactors{};
      const float sum = sum_of_row<T, kStaged ? 8 : 2>(source, w, member, member < kSumLanes ? count : 0, by, rule);
      if (member == 0 && count > 0) {
        factors[group] = rule.end(row, sum / static_cast<float>(width), by);
      }
    }
    __syncthreads();  // the factors are there
    const RowFactors by = count > 0 ? factors[group] : RowFactors{};
    for (int i = member * kGroup; i < count; i += threads * kGroup) {
      float values[kInputs][size_t{kGroup}];
      float scale[size_t{kGroup}];
      float results[size_t{kGroup}];
#pragma unroll
      for (int j = 0; j < kInputs; ++j) {
        load_group<false>(source[j] + i, values[j]);
      }
      load_group<false>(w + i, scale);
      rule.template sweep<T>(values, scale, by, results);
      store_group(out + row * width + i, results);
    }
  }
}

}  // namespace qlora_native::cuda
