// Lion over many tensors, bound by memory; built as cuda/adamw_step.cuh.
#pragma once

#include <cstdint>

#include "cuda/lion_step.h"
#include "cuda/tensor_list.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

// decay1, decay2: beta1, beta2, times the block's absmax beside codes. The rate is 0 where the direction is 0 or NaN.
__device__ __forceinline__ float lion_element(const LionFactors& by, float decay1, float decay2, float p, float g,
                                              float& m) {
  g = g * by.grad_factor;
  const float direction = m * decay1 + g * by.rest1;
  const float rate = direction > 0.0f ? by.lr : direction < 0.0f ? -by.lr : 0.0f;
  m = m * decay2 + g * by.rest2;
  return p * by.keep - rate;
}

// `count` elements from `begin` on of a tensor with 32-bit states.
template <typename T, int kThreads>
__device__ __forceinline__ void lion_elements(const OptimTensor& tensor, const LionFactors& by, int64_t begin,
                                              int count) {
  auto* params = static_cast<T*>(tensor.param) + begin;
  const auto* grads = static_cast<const T*>(tensor.grad) + begin;
  auto* exp_avg = static_cast<float*>(tensor.exp_avg) + begin;
  const bool vectors = are_aligned(kVectorBytes, params, grads, exp_avg);
  for (int i = static_cast<int>(threadIdx.x) * kPerGroup; i < count; i += kThreads * kPerGroup) {
    float p[kPerGroup];
    float g[kPerGroup];
    float m[kPerGroup];
    const bool whole = vectors && i + kPerGroup <= count;
    if (whole) {
      load_values<false>(params + i, p);
      load_values<true>(grads + i, g);
      load_values<false>(exp_avg + i, m);
    } else {
      load_first(params + i, count - i, p);
      load_first(grads + i, count - i, g);
      load_first(exp_avg + i, count - i, m);
    }
#pragma unroll
    for (int j = 0; j < kPerGroup; ++j) {
      p[j] = lion_element(by, by.beta1, by.beta2, p[j], g[j], m[j]);
    }
    if (whole) {
      store_values(params + i, p);
      store_values(exp_avg + i, m);
    } else {
      store_first(params + i, count - i, p);
      store_first(exp_avg + i, count - i, m);
    }
  }
}

// The same with 8-bit states: blocks of kStateBlock elements, padded with zeros as on the CPU.
template <typename T, int kThreads>
__device__ __forceinline__ void lion_coded(const OptimTensor& tensor, const LionFactors& by,
                                           const StateCode* codes,  // [2], shared
                                           int64_t begin, int count) {
  auto* params = static_cast<T*>(tensor.param) + begin;
  const auto* grads = static_cast<const T*>(tensor.grad) + begin;
  auto* exp_avg = static_cast<int8_t*>(tensor.exp_avg) + begin;
  float* absmaxes = tensor.exp_avg_absmax + begin / kStateBlock;
  const bool vectors = are_aligned(kVectorBytes, params, grads, exp_avg);
  constexpr auto kBlock = static_cast<int>(kStateBlock);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  for (int block = static_cast<int>(threadIdx.x / 32); block * kBlock < count; block += kThreads / 32) {
    float p[kGroupsPerLane][kPerGroup];
    float g[kGroupsPerLane][kPerGroup];
    float m[kGroupsPerLane][kPerGroup];
    const float decay1 = by.beta1 * absmaxes[block];
    const float decay2 = by.beta2 * absmaxes[block];
    const int first = block * kBlock + lane * kPerGroup;
#pragma unroll
    for (int k = 0; k < kGroupsPerLane; ++k) {
      const int i = first + 32 * kPerGroup * k;
      const bool whole = vectors && i + kPerGroup <= count;
      if (whole) {
        load_values<false>(params + i, p[k]);
        load_values<true>(grads + i, g[k]);
      } else {
        load_first(params + i, count - i, p[k]);
        load_first(grads + i, count - i, g[k]);
      }
      load_state(codes[0], exp_avg + i, count - i, whole, m[k]);
    }
#pragma unroll
    for (int k = 0; k < kGroupsPerLane; ++k) {
      const int i = first + 32 * kPerGroup * k;
#pragma unroll
      for (int j = 0; j < kPerGroup; ++j) {
        p[k][j] = lion_element(by, decay1, decay2, p[k][j], g[k][j], m[k][j]);
      }
      if (vectors && i + kPerGroup <= count) {
        store_values(params + i, p[k]);
      } else {
        store_first(params + i, count - i, p[k]);
      }
    }
    const BlockScale scale = new_scale(m, absmaxes + block);
#pragma unroll
    for (int k = 0; k < kGroupsPerLane; ++k) {
      const int i = first + 32 * kPerGroup * k;
      const bool whole = vectors && i + kPerGroup <= count;
      store_state(codes[0], scale, m[k], count - i, whole, exp_avg + i);
    }
  }
}

template <typename T, int kThreads>
__device__ __forceinline__ void lion_chunk(const OptimTensor& tensor, const LionFactors& by,
                                           const StateCode* codes,  // [2], shared
                                           int64_t begin) {
  const int64_t left = tensor.numel - begin;
  const auto count = static_cast<int>(left < kNormChunk ? left : kNormChunk);
  if (tensor.exp_avg_absmax != nullptr) {
    lion_coded<T, kThreads>(tensor, by, codes, begin, count);
  } else {
    lion_elements<T, kThreads>(tensor, by, begin, count);
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 7)
    lion_step_kernel(const OptimTable table,
                     const double* __restrict__ options,  // [groups, kLionRow]
                     const StepInputs inputs, const StepResults results,
                     uint32_t* finished) {  // [1]
  WP_SHARED(StateCode, codes, 2);
  WP_SHARED(LionFactors, factors, 1);
  WP_SHARED(bool, skips, 1);
  fetch_state_codes(codes);
  for (int64_t i = blockIdx.x; i < table.num_chunks; i += gridDim.x) {
    const OptimChunk chunk = table.chunks[i];
    const OptimTensor& tensor = table.tensors[chunk.tensor];
    __syncthreads();  // the last round's factors have been read
    if (threadIdx.x == 0) {
      const GradFactor grad = grad_factor_of(inputs);
      const double* row = options + tensor.group * kLionRow;
      skips[0] = grad.skips;
      factors[0] = lion_factors({row[0], row[1], row[2], row[3]}, grad.factor);
    }
    __syncthreads();
    if (skips[0]) {
      break;
    }
    const LionFactors by = factors[0];
    const int64_t begin = chunk.index * kNormChunk;
    switch (tensor.dtype) {
      case Dtype::kBfloat16:
        lion_chunk<Bf16, kThreads>(tensor, by, codes, begin);
        break;
      case Dtype::kFloat16:
        lion_chunk<Fp16, kThreads>(tensor, by, codes, begin);
        break;
      default:
        lion_chunk<float, kThreads>(tensor, by, codes, begin);
    }
  }
  finish_step<false>(table, inputs, results, finished);
}

}  // namespace qlora_native::cuda
