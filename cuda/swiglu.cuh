// silu(gate) * up and its derivative, with the arithmetic of cpu/kernels/activations-inl.h, every operation rounded.
#pragma once

#include <cstddef>

#include "core/exp.h"
#include "cuda/elementwise.cuh"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

// The bits of exp16() of cpu/isa/vec.h.
__device__ __forceinline__ float exp_of(float x) {
  constexpr ExpNumbers by{};
  float in = by.highest < x ? by.highest : x;  // comparisons that keep NaN
  in = by.lowest > in ? by.lowest : in;
  const float shifted = __fmaf_rn(in, by.per_ln2, by.magic);
  const float n = shifted - by.magic;
  const float r = __fmaf_rn(n, by.ln2_too_much, __fmaf_rn(n, by.minus_ln2, in));
  float p = by.terms[0];
#pragma unroll
  for (int i = 1; i < 6; ++i) {
    p = __fmaf_rn(p, r, by.terms[i]);
  }
  p = __fmaf_rn(p, r * r, r) + 1.0f;
  const int exponent = __float_as_int(shifted) - __float_as_int(by.magic);
  const int half = exponent >> 1;
  return p * __int_as_float((half + 127) << 23) * __int_as_float((exponent - half + 127) << 23);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// in: gate, up; out: round(silu(gate)) * up.
template <typename T>
struct Swiglu {
  template <size_t kCount>
  __device__ __forceinline__ void operator()(const float (&in)[2][kCount], float (&out)[1][kCount]) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      out[0][i] = in[0][i] * sigmoid(in[0][i]);
    }
    round_to<T>(out[0]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      out[0][i] *= in[1][i];
    }
  }
};

// in: grad_y, gate, up; out: the gradients to gate and up.
template <typename T>
struct SwigluGrad {
  template <size_t kCount>
  __device__ __forceinline__ void operator()(const float (&in)[3][kCount], float (&out)[2][kCount]) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      const float g = in[1][i];
      const float s = sigmoid(g);
      out[0][i] = (in[0][i] * in[2][i]) * (s * (1.0f + g * (1.0f - s)));
      out[1][i] = g * s;
    }
    round_to<T>(out[1]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      out[1][i] *= in[0][i];
    }
  }
};

}  // namespace qlora_native::cuda
