// Adam and AdamW over many tensors, bound by memory: a thread block updates a chunk of one tensor.
//
// The arithmetic of an element is that of cpu/kernels-optim-inl.h, every operation rounded.
#pragma once

#include <cstdint>

#include "cuda/adamw_step.h"
#include "cuda/tensor_list.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

// m, v: the states as values, or as values of codes; m_decay, v_decay: beta1, beta2, times the block's absmax beside
// codes.
template <bool kCoupled>
__device__ __forceinline__ float adamw_element(const AdamwFactors& by, float m_decay, float v_decay, float p, float g,
                                               float& m, float& v) {
  g = g * by.grad_factor;
  if (kCoupled && by.coupled_decay != 0.0f) {
    g = g + p * by.coupled_decay;
  }
  m = m * m_decay + g * by.rest1;
  v = v * v_decay + (g * by.rest2) * g;
  return p * by.keep - (m * by.step_size) / (sqrtf(v) * by.root_correction + by.eps);
}

// `count` elements from `begin` on of a tensor with 32-bit states.
template <typename T, bool kCoupled>
__device__ __forceinline__ void adamw_elements(const OptimTensor& tensor, const AdamwFactors& by, int64_t begin,
                                               int count) {
  auto* params = static_cast<T*>(tensor.param) + begin;
  const auto* grads = static_cast<const T*>(tensor.grad) + begin;
  auto* exp_avg = static_cast<float*>(tensor.exp_avg) + begin;
  auto* exp_avg_sq = static_cast<float*>(tensor.exp_avg_sq) + begin;
  const bool vectors = are_aligned(kVectorBytes, params, grads, exp_avg, exp_avg_sq);
  for (int i = static_cast<int>(threadIdx.x) * kPerGroup; i < count; i += kStepThreads * kPerGroup) {
    float p[kPerGroup];
    float g[kPerGroup];
    float m[kPerGroup];
    float v[kPerGroup];
    const bool whole = vectors && i + kPerGroup <= count;
    if (whole) {
      load_values<false>(params + i, p);
      load_values<true>(grads + i, g);
      load_values<false>(exp_avg + i, m);
      load_values<false>(exp_avg_sq + i, v);
    } else {
      load_first(params + i, count - i, p);
      load_first(grads + i, count - i, g);
      load_first(exp_avg + i, count - i, m);
      load_first(exp_avg_sq + i, count - i, v);
    }
#pragma unroll
    for (int j = 0; j < kPerGroup; ++j) {
      p[j] = adamw_element<kCoupled>(by, by.beta1, by.beta2, p[j], g[j], m[j], v[j]);
    }
    if (whole) {
      store_values(params + i, p);
      store_values(exp_avg + i, m);
      store_values(exp_avg_sq + i, v);
    } else {
      store_first(params + i, count - i, p);
      store_first(exp_avg + i, count - i, m);
      store_first(exp_avg_sq + i, count - i, v);
    }
  }
}

// The same with 8-bit states: blocks of kStateBlock elements, padded with zeros as on the CPU.
template <typename T, bool kCoupled>
__device__ __forceinline__ void adamw_coded(const OptimTensor& tensor, const AdamwFactors& by,
                                            const StateCode* codes,  // [2], shared
                                            int64_t begin, int count) {
  auto* params = static_cast<T*>(tensor.param) + begin;
  const auto* grads = static_cast<const T*>(tensor.grad) + begin;
  auto* exp_avg = static_cast<int8_t*>(tensor.exp_avg) + begin;
  auto* exp_avg_sq = static_cast<uint8_t*>(tensor.exp_avg_sq) + begin;
  float* m_absmaxes = tensor.exp_avg_absmax + begin / kStateBlock;
  float* v_absmaxes = tensor.exp_avg_sq_absmax + begin / kStateBlock;
  const bool vectors = are_aligned(kVectorBytes, params, grads, exp_avg, exp_avg_sq);
  constexpr auto kBlock = static_cast<int>(kStateBlock);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  for (int block = static_cast<int>(threadIdx.x / 32); block * kBlock < count; block += kStepThreads / 32) {
    float p[kGroupsPerLane][kPerGroup];
    float g[kGroupsPerLane][kPerGroup];
    float m[kGroupsPerLane][kPerGroup];
    float v[kGroupsPerLane][kPerGroup];
    const float m_decay = by.beta1 * m_absmaxes[block];
    const float v_decay = by.beta2 * v_absmaxes[block];
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
      load_state(codes[1], exp_avg_sq + i, count - i, whole, v[k]);
    }
#pragma unroll
    for (int k = 0; k < kGroupsPerLane; ++k) {
      const int i = first + 32 * kPerGroup * k;
#pragma unroll
      for (int j = 0; j < kPerGroup; ++j) {
        p[k][j] = adamw_element<kCoupled>(by, m_decay, v_decay, p[k][j], g[k][j], m[k][j], v[k][j]);
      }
      if (vectors && i + kPerGroup <= count) {
        store_values(params + i, p[k]);
      } else {
        store_first(params + i, count - i, p[k]);
      }
    }
    const BlockScale m_scale = new_scale(m, m_absmaxes + block);
    const BlockScale v_scale = new_scale(v, v_absmaxes + block);
#pragma unroll
    for (int k = 0; k < kGroupsPerLane; ++k) {
      const int i = first + 32 * kPerGroup * k;
      const bool whole = vectors && i + kPerGroup <= count;
      store_state(codes[0], m_scale, m[k], count - i, whole, exp_avg + i);
      store_state(codes[1], v_scale, v[k], count - i, whole, exp_avg_sq + i);
    }
  }
}

template <typename T, bool kCoupled>
__device__ __forceinline__ void adamw_chunk(const OptimTensor& tensor, const AdamwFactors& by,
                                            const StateCode* codes,  // [2], shared
                                            int64_t begin) {
  const int64_t left = tensor.numel - begin;
  const auto count = static_cast<int>(left < kNormChunk ? left : kNormChunk);
  if (tensor.exp_avg_absmax != nullptr) {
    adamw_coded<T, kCoupled>(tensor, by, codes, begin, count);
  } else {
    adamw_elements<T, kCoupled>(tensor, by, begin, count);
  }
}

template <bool kDecoupled>
__global__ void __launch_bounds__(kStepThreads, 5)
    adamw_step_kernel(const OptimTable table,
                      const double* __restrict__ options,  // [groups, kAdamwRow]
                      const StepInputs inputs, const StepResults results,
                      uint32_t* finished) {  // [1]
  WP_SHARED(StateCode, codes, 2);
  WP_SHARED(AdamwFactors, factors, 1);
  WP_SHARED(bool, skips, 1);
  fetch_state_codes(codes);
  for (int64_t i = blockIdx.x; i < table.num_chunks; i += gridDim.x) {
    const OptimChunk chunk = table.chunks[i];
    const OptimTensor& tensor = table.tensors[chunk.tensor];
    __syncthreads();  // the last round's factors have been read
    if (threadIdx.x == 0) {
      const GradFactor grad = grad_factor_of(inputs);
      const double* row = options + tensor.group * kAdamwRow;
      const AdamwOptions by{row[0], row[1], row[2], row[3], row[4], kDecoupled};
      skips[0] = grad.skips;
      factors[0] = adamw_factors(by, static_cast<int64_t>(*tensor.step + 1.0f), grad.factor);
    }
    __syncthreads();
    if (skips[0]) {
      break;
    }
    const AdamwFactors by = factors[0];
    const int64_t begin = chunk.index * kNormChunk;
    switch (tensor.dtype) {
      case Dtype::kBfloat16:
        adamw_chunk<Bf16, !kDecoupled>(tensor, by, codes, begin);
        break;
      case Dtype::kFloat16:
        adamw_chunk<Fp16, !kDecoupled>(tensor, by, codes, begin);
        break;
      default:
        adamw_chunk<float, !kDecoupled>(tensor, by, codes, begin);
    }
  }
  finish_step<true>(table, inputs, results, finished);
}

}  // namespace qlora_native::cuda
