// What the kernels over many tensors share.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/optim.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

// f with a value of the type that `dtype` names.
template <typename F>
__device__ __forceinline__ auto with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return f(Bf16{});
    case Dtype::kFloat16:
      return f(Fp16{});
    default:
      return f(float{});
  }
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

}  // namespace qlora_native::cuda
