// What the kernels over many tensors share.
#pragma once

#include <cstdint>

#include "core/optim.h"
#include "core/state_code.h"
#include "cuda/grid.h"
#include "cuda/tensor_list.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kStepThreads = 128;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

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

// Counts the warps (or blocks) that are done; true for the lanes of the one that is the last of `expected`, which then
// sees all that the others wrote before. Called by whole warps; the count is 0 before and after a launch.
__device__ __forceinline__ bool is_last_to_finish(uint32_t expected, uint32_t* finished) {  // [1]
  uint32_t before = 0;
  if (threadIdx.x % 32 == 0) {
    __threadfence();
    before = atomicAdd(finished, 1u);
    if (before == expected - 1) {
      *finished = 0;
      __threadfence();
    }
  }
  __syncwarp();
  return __shfl_sync(kWholeWarp, before, 0) == expected - 1;
}

// kNormLanes values, one a lane: the halving tree of sum_by_halves().
__device__ __forceinline__ double sum_of_lanes(double sum) {
  static_assert(kNormLanes == 32);
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, half);
  }
  return sum;
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
// Elements. A lane takes four consecutive ones at a time, its neighbours those beside them: 16 bytes of fp32, 8 of 16
// bits, 4 of codes, so that every sector that a warp touches is touched whole.

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
      const auto byte = static_cast<uint8_t>(encode_state(code, scale.normaliser(values[i]), Code{}));
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

}  // namespace qlora_native::cuda
