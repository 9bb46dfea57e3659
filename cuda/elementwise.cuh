// Kernels over elements that depend on nothing but the same element of their inputs: a thread has one vector of each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/grid.h"
#include "cuda/vec.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

inline constexpr int kElementwiseThreads = 256;

// f with a value of the type that `dtype` names.
template <typename F>
cudaError_t launch_for(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBfloat16:
      return f(Bf16{});
    case Dtype::kFloat16:
      return f(Fp16{});
  }
  return cudaErrorInvalidValue;
}

// One element, by the conversions of a vector.
template <typename T>
__device__ __forceinline__ float widened(T x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    float pair[2];
    unpack_word<T>(x.bits, pair);
    return pair[0];
  }
}

template <typename T>
__device__ __forceinline__ T narrowed(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    const float pair[2] = {x, 0.0f};
    return T{static_cast<uint16_t>(wp::pack_word<T>(pair))};
  }
}

// By one instruction in every place: a plain assignment of 16 bytes is taken apart by the compiler in some of them.
template <typename T, size_t kCount>
__device__ __forceinline__ void store_vector(T* x,  // [kCount]
                                             const float (&values)[kCount]) {
  static_assert(kCount == kPerVector<T>);
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  __stwb(reinterpret_cast<uint4*>(x),
         make_uint4(wp::pack_word<T>(values), wp::pack_word<T>(values + kPerWord),
                    wp::pack_word<T>(values + 2 * kPerWord), wp::pack_word<T>(values + 3 * kPerWord)));
}

// A whole vector, or one element, which may lie anywhere.
template <bool kStreaming, typename T, size_t kCount>
__device__ __forceinline__ void load_group(const T* x,  // [kCount]
                                           float (&out)[kCount]) {
  if constexpr (kCount == 1) {
    out[0] = widened(*x);
  } else {
    load_values<kStreaming>(x, out);
  }
}

template <typename T, size_t kCount>
__device__ __forceinline__ void store_group(T* x,  // [kCount]
                                            const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *x = narrowed<T>(values[0]);
  } else {
    store_vector(x, values);
  }
}

// Elements [0, count), zeros after them. vectors: x lies at a multiple of 16 bytes.
template <typename T, size_t kCount>
__device__ __forceinline__ void load_part(const T* x,  // [count]
                                          int count, bool vectors, float (&out)[kCount]) {
  if (vectors && count == static_cast<int>(kCount)) {
    load_values<true>(x, out);
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      out[i] = i < count ? widened(x[i]) : 0.0f;
    }
  }
}

template <typename T, size_t kCount>
__device__ __forceinline__ void store_part(T* x,  // [count]
                                           int count, bool vectors, const float (&values)[kCount]) {
  if (vectors && count == static_cast<int>(kCount)) {
    store_vector(x, values);
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      if (i < count) {
        x[i] = narrowed<T>(values[i]);
      }
    }
  }
}

// Rounded to T and widened again: where a chain of 16-bit ops would have rounded.
template <typename T, size_t kCount>
__device__ __forceinline__ void round_to(float (&values)[kCount]) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  if constexpr (kCount % kPerWord != 0) {
    static_assert(kCount == 1);
    values[0] = widened(narrowed<T>(values[0]));
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCount); i += kPerWord) {
      unpack_word<T>(wp::pack_word<T>(values + i), values + i);
    }
  }
}

// Operands of a kernel: arrays of one length.
template <typename P, int kCount>
struct Arrays {
  P at[size_t{kCount}];  // [numel] each
};

// rule(inputs, outputs) computes fp32 [kIn][vector] to fp32 [kOut][vector]. vectors: all arrays lie at multiples of 16
// bytes.
template <typename T, int kIn, int kOut, typename Rule>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_kernel(const Arrays<const T*, kIn> in, const Arrays<T*, kOut> out, int64_t numel, bool vectors,
                       Rule rule) {
  constexpr int kGroup = kPerVector<T>;
  const int64_t first = (first_item(blockIdx.x, kElementwiseThreads) + threadIdx.x) * kGroup;
  const int count = at_most(numel - first, kGroup);
  if (count == 0) {
    return;
  }
  float inputs[kIn][size_t{kGroup}];
  float outputs[kOut][size_t{kGroup}];
#pragma unroll
  for (int i = 0; i < kIn; ++i) {
    load_part(in.at[i] + first, count, vectors, inputs[i]);
  }
  rule(inputs, outputs);
#pragma unroll
  for (int i = 0; i < kOut; ++i) {
    store_part(out.at[i] + first, count, vectors, outputs[i]);
  }
}

template <typename T, int kIn, int kOut, typename Rule>
cudaError_t launch_elementwise(const Arrays<const T*, kIn>& in, const Arrays<T*, kOut>& out, int64_t numel, Rule rule,
                               cudaStream_t stream) {
  bool vectors = true;
  for (const T* array : in.at) {
    vectors = vectors && are_aligned(kVectorBytes, array);
  }
  for (const T* array : out.at) {
    vectors = vectors && are_aligned(kVectorBytes, array);
  }
  return wp::launch(elementwise_kernel<T, kIn, kOut, Rule>,
                    dim3(grid_blocks(numel, kElementwiseThreads * kPerVector<T>)), dim3(kElementwiseThreads), 0, stream,
                    in, out, numel, vectors, rule);
}

}  // namespace qlora_native::cuda
