// The softmax of one row of logits by a thread block, bound by memory: one sweep for the loss, one for the gradient,
// which the second-level cache serves.
//
// The first sweep keeps the largest logit met so far and the sum of exponentials relative to it, and rescales the sum
// whenever a larger one comes (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "cuda/grid.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kSoftmaxThreads = 512;

struct RunningSum {
  float top;
  float sum;  // of exp(logit - top)
};

__device__ __forceinline__ RunningSum joined(const RunningSum& a, const RunningSum& b) {
  const float top = a.top > b.top ? a.top : b.top;
  return {top, a.sum * __expf(a.top - top) + b.sum * __expf(b.top - top)};
}

template <size_t kCount>
__device__ __forceinline__ void take(RunningSum& running, const float (&logits)[kCount]) {
  float top = running.top;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount); ++i) {
    top = logits[i] > top ? logits[i] : top;
  }
  running.sum *= __expf(running.top - top);
  running.top = top;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kCount); ++i) {
    running.sum += __expf(logits[i] - top);
  }
}

// Every thread of the block gets the same, in an order that depends on nothing.
template <int kThreads>
__device__ __forceinline__ RunningSum joined_by_block(RunningSum running,
                                                      RunningSum* of_warps) {  // [kThreads / 32], shared
  for (int offset = 16; offset > 0; offset /= 2) {
    const float top = __shfl_xor_sync(0xffffffffu, running.top, offset);
    const float sum = __shfl_xor_sync(0xffffffffu, running.sum, offset);
    running = joined(running, {top, sum});
  }
  __syncthreads();  // the last row's have been read
  if (threadIdx.x % 32 == 0) {
    of_warps[threadIdx.x / 32] = running;
  }
  __syncthreads();
  running = of_warps[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    running = joined(running, of_warps[warp]);
  }
  return running;
}

// A row of the logits, by the whole block. word: 0, or the bits that are NaN in every format.
template <typename T, int kThreads>
__device__ __forceinline__ void fill_row(T* x,                               // [vocabulary]
                                         int64_t whole, int64_t vocabulary,  // elements in vectors, and all
                                         uint32_t word) {
  const auto thread = static_cast<int64_t>(threadIdx.x);
#pragma unroll 1
  for (int64_t i = thread * kPerVector<T>; i < whole; i += kThreads * kPerVector<T>) {
    wp::store_16(x + i, make_uint4(word, word, word, word));
  }
#pragma unroll 1
  for (int64_t i = whole + thread; i < vocabulary; i += kThreads) {
    x[i] = from_float<T>(std::bit_cast<float>(word));
  }
}

// vectors: every row lies at a multiple of 16 bytes.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_loss_kernel(T* logits,                            // [rows, vocabulary]
                        const int64_t* __restrict__ targets,  // [rows]
                        int64_t ignore_index, int64_t rows, int64_t vocabulary, bool vectors, bool need_gradient,
                        float* __restrict__ losses) {  // [rows]
  WP_SHARED(RunningSum, of_warps, size_t{kThreads / 32});
  constexpr float kLowest = -3.402823466e38f;
  constexpr int kGroup = kPerVector<T>;
  const int64_t whole = vectors ? vocabulary / kGroup * kGroup : 0;
  const auto thread = static_cast<int64_t>(threadIdx.x);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T* x = logits + row * vocabulary;
    const int64_t target = targets[row];
    if (target == ignore_index || target < 0 || target >= vocabulary) {
      const uint32_t word = target == ignore_index ? 0u : ~0u;
      if (thread == 0) {
        losses[row] = std::bit_cast<float>(word);
      }
      if (need_gradient) {
        fill_row<T, kThreads>(x, whole, vocabulary, word);
      }
      continue;
    }
    const float chosen = to_float(x[target]);
    RunningSum running{kLowest, 0.0f};
    for (int64_t i = thread * kGroup; i < whole; i += kThreads * kGroup) {
      float values[size_t{kGroup}];
      load_values<false>(x + i, values);
      take(running, values);
    }
    for (int64_t i = whole + thread; i < vocabulary; i += kThreads) {
      const float value[1] = {to_float(x[i])};
      take(running, value);
    }
    const RunningSum total = joined_by_block<kThreads>(running, of_warps);  // after it, x may be overwritten
    if (thread == 0) {
      losses[row] = logf(total.sum) + (total.top - chosen);
    }
    if (!need_gradient) {
      continue;
    }
    // At the target from the unrounded probability: rounded to 16 bits, its distance from one would be lost.
    const float share = 1.0f / total.sum;
    for (int64_t i = thread * kGroup; i < whole; i += kThreads * kGroup) {
      float values[size_t{kGroup}];
      load_values<false>(x + i, values);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        values[j] = __expf(values[j] - total.top) * share - (i + j == target ? 1.0f : 0.0f);
      }
      store_values(x + i, values);
    }
    for (int64_t i = whole + thread; i < vocabulary; i += kThreads) {
      x[i] = from_float<T>(__expf(to_float(x[i]) - total.top) * share - (i == target ? 1.0f : 0.0f));
    }
  }
}

}  // namespace qlora_native::cuda
