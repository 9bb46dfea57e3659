// The kernel of an optimizer, but for the arithmetic of an element: a thread block updates a chunk of one tensor after
// another, and is bound by memory.
//
// A lane takes four consecutive elements at a time, its neighbors those beside them: 16 bytes of fp32, 8 of 16 bits, 4
// of codes, so that every sector that a warp touches is touched whole.
//
// What an optimizer adds is a Rule:
//   Factors        of core/optim.h, beta1 and beta2 among them
//   kRow           numbers of its options
//   kSecondMoment  whether a tensor has exp_avg_sq
//   kCountsSteps   whether it has `step`
//   factors(row, tensor, grad_factor)
//   element(by, decay1, decay2, p, g, m, v)   gives the new parameter and leaves the new moments
//
// decay1 and decay2 are beta1 and beta2; beside codes, where m and v are values of codes, times the absmax of the first
// and of the last moment. The arithmetic is that of cpu/kernels/optim-inl.h, every operation rounded.
#pragma once

#include <bit>
#include <cstdint>

#include "core/optim.h"
#include "core/state_code.h"
#include "cuda/grid.h"
#include "cuda/tensor_list.cuh"
#include "cuda/tensor_list.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kStepThreads = 128;

struct GradFactor {
  double factor;
  double norm;  // unscaled
  bool skips;
};

// In double precision, as python/qlora_native/optim.py reckons it.
QLORA_NATIVE_HD GradFactor grad_factor_of(const StepInputs& inputs) {
  GradFactor grad{inputs.grad_factor, 0.0, inputs.found_inf != nullptr && *inputs.found_inf != 0.0f};
  if (inputs.grad_scale != nullptr) {
    grad.factor *= 1.0 / static_cast<double>(*inputs.grad_scale);
  }
  if (inputs.norm != nullptr) {
    grad.norm = grad.factor * *inputs.norm;
    const bool finite = (std::bit_cast<uint64_t>(grad.norm) >> 52 & 0x7ffu) != 0x7ffu;
    grad.skips = grad.skips || !finite;
    const double ratio = inputs.max_norm / (grad.norm + 1e-6);
    grad.factor *= ratio < 1.0 ? ratio : 1.0;
  }
  return grad;
}

// After the last chunk: one warp counts the step and leaves the results.
template <bool kCountsSteps>
__device__ __forceinline__ void finish_step(const OptimTable& table, const StepInputs& inputs,
                                            const StepResults& results,
                                            uint32_t* finished) {  // [1]
  if (threadIdx.x >= 32 || !is_last_to_finish(gridDim.x, finished)) {
    return;
  }
  const GradFactor grad = grad_factor_of(inputs);
  if (kCountsSteps && !grad.skips) {
    for (int64_t i = threadIdx.x; i < table.num_tensors; i += 32) {
      *table.tensors[i].step += 1.0f;
    }
  }
  if (threadIdx.x == 0) {
    if (results.grad_norm != nullptr) {
      *results.grad_norm = grad.norm;
    }
    if (results.skipped != nullptr) {
      *results.skipped = grad.skips ? 1.0f : 0.0f;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Codes

inline constexpr int kPerGroup = 4;

// States of 8 bits are taken by warps, a block of kStateBlock elements each.
inline constexpr int kGroupsPerLane = static_cast<int>(kStateBlock) / (32 * kPerGroup);

__device__ constexpr StateCode kStateCodes[2] = {kSignedState, kUnsignedState};

// kStateCodes to shared memory, one bank an entry of a look-up. A barrier has to follow.
__device__ __forceinline__ void fetch_state_codes(StateCode* codes) {  // [2], shared
  static_assert(sizeof(StateCode) % sizeof(uint32_t) == 0);
  constexpr int kWords = 2 * sizeof(StateCode) / sizeof(uint32_t);
  const auto* from = reinterpret_cast<const uint32_t*>(kStateCodes);
  auto* to = reinterpret_cast<uint32_t*>(codes);
  for (int i = static_cast<int>(threadIdx.x); i < kWords; i += static_cast<int>(blockDim.x)) {
    to[i] = from[i];
  }
}

// The largest of the warp's magnitudes, as bits.
__device__ __forceinline__ uint32_t highest_of_warp(const float (&values)[kGroupsPerLane][kPerGroup]) {
  uint32_t highest = 0;
#pragma unroll
  for (int i = 0; i < kGroupsPerLane * kPerGroup; ++i) {
    const uint32_t bits = __float_as_uint(values[i / kPerGroup][i % kPerGroup]) & 0x7fffffffu;
    highest = bits > highest ? bits : highest;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kWholeWarp, highest, offset);
    highest = other > highest ? other : highest;
  }
  return highest;
}

// The scale of the block whose values the warp holds; its absmax is kept. The shuffles come after every lane's look at
// the old absmax.
__device__ __forceinline__ BlockScale new_scale(const float (&values)[kGroupsPerLane][kPerGroup],
                                                float* absmax) {  // [1]
  const BlockScale scale(highest_of_warp(values));
  if (threadIdx.x % 32 == 0) {
    *absmax = scale.absmax;
  }
  return scale;
}

// Codes of `count` elements, all four where `whole`, at a multiple of 4 bytes; 0 after them.
template <typename Code>
__device__ __forceinline__ void load_state(const StateCode& code, const Code* codes,  // [count]
                                           int count, bool whole, float (&values)[kPerGroup]) {
  uint32_t word = 0;
  if (whole) {
    word = *reinterpret_cast<const uint32_t*>(codes);
  } else {
#pragma unroll
    for (int i = 0; i < kPerGroup; ++i) {
      word |= i < count ? static_cast<uint32_t>(static_cast<uint8_t>(codes[i])) << (8 * i) : 0u;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerGroup; ++i) {
    values[i] = decode_state(code, static_cast<Code>(word >> (8 * i) & 255u));
  }
}

__device__ __forceinline__ int8_t encode_state(const StateCode& code, float x, int8_t) {
  return encode_signed(code, x);
}
__device__ __forceinline__ uint8_t encode_state(const StateCode& code, float x, uint8_t) {
  return encode_unsigned(code, x);
}

template <typename Code>
__device__ __forceinline__ void store_state(const StateCode& code, const BlockScale& scale,
                                            const float (&values)[kPerGroup], int count, bool whole,
                                            Code* codes) {  // [count]
  uint32_t word = 0;
  if (scale.encodes) {
#pragma unroll
    for (int i = 0; i < kPerGroup; ++i) {
      const auto byte = static_cast<uint8_t>(encode_state(code, scale.normalizer(values[i]), Code{}));
      word |= static_cast<uint32_t>(byte) << (8 * i);
    }
  }
  if (whole) {
    *reinterpret_cast<uint32_t*>(codes) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerGroup; ++i) {
    if (i < count) {
      codes[i] = static_cast<Code>(word >> (8 * i) & 255u);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Elements

// `count` elements from `begin` on of a tensor with 32-bit states.
template <typename Rule, typename T>
__device__ __forceinline__ void update_elements(const OptimTensor& tensor, const typename Rule::Factors& by,
                                                int64_t begin, int count) {
  auto* params = static_cast<T*>(tensor.param) + begin;
  const auto* grads = static_cast<const T*>(tensor.grad) + begin;
  auto* exp_avg = static_cast<float*>(tensor.exp_avg) + begin;
  auto* exp_avg_sq = Rule::kSecondMoment ? static_cast<float*>(tensor.exp_avg_sq) + begin : nullptr;
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
      if constexpr (Rule::kSecondMoment) {
        load_values<false>(exp_avg_sq + i, v);
      }
    } else {
      load_first(params + i, count - i, p);
      load_first(grads + i, count - i, g);
      load_first(exp_avg + i, count - i, m);
      if constexpr (Rule::kSecondMoment) {
        load_first(exp_avg_sq + i, count - i, v);
      }
    }
#pragma unroll
    for (int j = 0; j < kPerGroup; ++j) {
      p[j] = Rule::element(by, by.beta1, by.beta2, p[j], g[j], m[j], v[j]);
    }
    if (whole) {
      store_values(params + i, p);
      store_values(exp_avg + i, m);
      if constexpr (Rule::kSecondMoment) {
        store_values(exp_avg_sq + i, v);
      }
    } else {
      store_first(params + i, count - i, p);
      store_first(exp_avg + i, count - i, m);
      if constexpr (Rule::kSecondMoment) {
        store_first(exp_avg_sq + i, count - i, v);
      }
    }
  }
}

// The same with 8-bit states: blocks of kStateBlock elements, padded with zeros as on the CPU.
template <typename Rule, typename T>
__device__ __forceinline__ void update_coded(const OptimTensor& tensor, const typename Rule::Factors& by,
                                             const StateCode* codes,  // [2], shared
                                             int64_t begin, int count) {
  auto* params = static_cast<T*>(tensor.param) + begin;
  const auto* grads = static_cast<const T*>(tensor.grad) + begin;
  auto* exp_avg = static_cast<int8_t*>(tensor.exp_avg) + begin;
  auto* exp_avg_sq = Rule::kSecondMoment ? static_cast<uint8_t*>(tensor.exp_avg_sq) + begin : nullptr;
  float* m_absmaxes = tensor.exp_avg_absmax + begin / kStateBlock;
  float* v_absmaxes = Rule::kSecondMoment ? tensor.exp_avg_sq_absmax + begin / kStateBlock : nullptr;
  const bool vectors = are_aligned(kVectorBytes, params, grads, exp_avg, exp_avg_sq);
  constexpr auto kBlock = static_cast<int>(kStateBlock);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  for (int block = static_cast<int>(threadIdx.x / 32); block * kBlock < count; block += kStepThreads / 32) {
    float p[kGroupsPerLane][kPerGroup];
    float g[kGroupsPerLane][kPerGroup];
    float m[kGroupsPerLane][kPerGroup];
    float v[kGroupsPerLane][kPerGroup];
    const float decay1 = by.beta1 * m_absmaxes[block];
    const float decay2 = by.beta2 * (Rule::kSecondMoment ? v_absmaxes : m_absmaxes)[block];
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
      if constexpr (Rule::kSecondMoment) {
        load_state(codes[1], exp_avg_sq + i, count - i, whole, v[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kGroupsPerLane; ++k) {
      const int i = first + 32 * kPerGroup * k;
#pragma unroll
      for (int j = 0; j < kPerGroup; ++j) {
        p[k][j] = Rule::element(by, decay1, decay2, p[k][j], g[k][j], m[k][j], v[k][j]);
      }
      if (vectors && i + kPerGroup <= count) {
        store_values(params + i, p[k]);
      } else {
        store_first(params + i, count - i, p[k]);
      }
    }
    const BlockScale m_scale = new_scale(m, m_absmaxes + block);
    const BlockScale v_scale = Rule::kSecondMoment ? new_scale(v, v_absmaxes + block) : m_scale;
#pragma unroll
    for (int k = 0; k < kGroupsPerLane; ++k) {
      const int i = first + 32 * kPerGroup * k;
      const bool whole = vectors && i + kPerGroup <= count;
      store_state(codes[0], m_scale, m[k], count - i, whole, exp_avg + i);
      if constexpr (Rule::kSecondMoment) {
        store_state(codes[1], v_scale, v[k], count - i, whole, exp_avg_sq + i);
      }
    }
  }
}

// The body of the kernel.
template <typename Rule>
__device__ __forceinline__ void run_step(const OptimTable& table,
                                         const double* __restrict__ options,  // [groups, Rule::kRow]
                                         const StepInputs& inputs, const StepResults& results,
                                         uint32_t* finished) {  // [1]
  using Factors = typename Rule::Factors;
  WP_SHARED(StateCode, codes, 2);
  WP_SHARED(Factors, factors, 1);
  WP_SHARED(bool, skips, 1);
  fetch_state_codes(codes);
  for (int64_t i = blockIdx.x; i < table.num_chunks; i += gridDim.x) {
    const OptimChunk chunk = table.chunks[i];
    const OptimTensor& tensor = table.tensors[chunk.tensor];
    __syncthreads();  // the last round's factors have been read
    if (threadIdx.x == 0) {
      const GradFactor grad = grad_factor_of(inputs);
      skips[0] = grad.skips;
      factors[0] = Rule::factors(options + tensor.group * Rule::kRow, tensor, grad.factor);
    }
    __syncthreads();
    if (skips[0]) {
      break;
    }
    const Factors by = factors[0];
    const int64_t begin = chunk.index * kNormChunk;
    const int count = at_most(tensor.numel - begin, static_cast<int>(kNormChunk));
    with_type(tensor.dtype, [&](auto zero) {
      if (tensor.exp_avg_absmax != nullptr) {
        update_coded<Rule, decltype(zero)>(tensor, by, codes, begin, count);
      } else {
        update_elements<Rule, decltype(zero)>(tensor, by, begin, count);
      }
    });
  }
  finish_step<Rule::kCountsSteps>(table, inputs, results, finished);
}

}  // namespace qlora_native::cuda
