// Each primitive of cuda/wp.cuh, and each intrinsic that the kernels rest on, alone: what every lane gets, as 32-bit
// words.
//
// All results are exact, so that a GPU and the emulator must agree to the bit. Products are of small whole numbers,
// whose sums in fp32 do not depend on the order.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "cuda/wp.cuh"

namespace conformance {

namespace wp = qlora_native::wp;
using qlora_native::Bf16;
using qlora_native::Fp16;

inline constexpr int kLanes = 32;
inline constexpr int kMostWords = 16;  // of a lane

template <typename T>
__device__ uint32_t bits_of(int value) {  // a small whole number
  const float pair[2] = {static_cast<float>(value), 0.0f};
  return wp::pack_word<T>(pair) & 0xffffu;
}

template <typename T>
__device__ uint32_t pair_of(int low, int high) {
  return bits_of<T>(low) | bits_of<T>(high) << 16;
}

__device__ inline int a_at(int row, int column) { return (3 * row + 5 * column) % 17 - 8; }
__device__ inline int b_at(int row, int column) { return (7 * row + 11 * column) % 13 - 6; }

// 32 rows of 8 halves, each its own number, read back by ldmatrix.
template <bool kTrans>
__global__ void ldmatrix(uint32_t* out) {  // [32, 4]
  WP_SHARED(uint4, rows, 32);
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) {
    const auto first = static_cast<uint32_t>(8 * lane + 2 * i);
    words[i] = first | (first + 1) << 16;
  }
  wp::store_16(&rows[lane], make_uint4(words[0], words[1], words[2], words[3]));
  __syncwarp();
  if constexpr (kTrans) {
    wp::ldmatrix_x4_trans(words, &rows[lane]);
  } else {
    wp::ldmatrix_x4(words, &rows[lane]);
  }
  for (int i = 0; i < 4; ++i) {
    out[4 * lane + i] = words[i];
  }
}

// Fragments by the tables of the PTX manual, section 9.7.14.5.
template <typename T>
__global__ void mma_m16n8k16(uint32_t* out) {  // [32, 4]
  const int lane = static_cast<int>(threadIdx.x);
  const int g = lane / 4;
  const int t = lane % 4;
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8;
    const int column = 2 * t + i / 2 * 8;
    a[i] = pair_of<T>(a_at(row, column), a_at(row, column + 1));
    d[i] = static_cast<float>(8 * (g + i / 2 * 8) + 2 * t + i % 2);
  }
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i * 8;
    b[i] = pair_of<T>(b_at(row, g), b_at(row + 1, g));
  }
  wp::mma_m16n8k16<T>(d, a, b);
  wp::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) {
    out[4 * lane + i] = __float_as_uint(d[i]);
  }
}

__global__ void mma_m16n8k8_fp16(uint32_t* out) {  // [32, 4]
  const int lane = static_cast<int>(threadIdx.x);
  const int g = lane / 4;
  const int t = lane % 4;
  const uint32_t a[2] = {pair_of<Fp16>(a_at(g, 2 * t), a_at(g, 2 * t + 1)),
                         pair_of<Fp16>(a_at(g + 8, 2 * t), a_at(g + 8, 2 * t + 1))};
  float d[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  wp::mma_m16n8k8_fp16(d, a, pair_of<Fp16>(b_at(2 * t, g), b_at(2 * t + 1, g)));
  for (int i = 0; i < 4; ++i) {
    out[4 * lane + i] = __float_as_uint(d[i]);
  }
}

// Whole, cut and empty copies; two groups, waited for one after the other. `in` is [32, 4] words.
__global__ void cp_async(const uint32_t* in, uint32_t* out) {  // [32, 8]
  WP_SHARED(uint4, first, 32);
  WP_SHARED(uint4, second, 32);
  const int lane = static_cast<int>(threadIdx.x);
  wp::cp_async_16(&first[lane], in + 4 * lane);
  wp::cp_async_commit();
  wp::cp_async_16(&second[lane], in + 4 * lane, lane % 17);
  wp::cp_async_commit();
  wp::cp_async_wait<1>();
  __syncwarp();
  const uint4 whole = wp::load_16(&first[(lane + 1) % 32]);
  wp::cp_async_wait<0>();
  __syncwarp();
  const uint4 cut = wp::load_16(&second[(lane + 1) % 32]);
  wp::store_16(out + 8 * lane, whole);
  wp::store_16(out + 8 * lane + 4, cut);
}

// Rounding to 16 bits and back: ties, overflow, subnormals, infinity. `in` is [32, 4] floats as words.
__global__ void rounding(const uint32_t* in, uint32_t* out) {  // [32, 12]
  const int lane = static_cast<int>(threadIdx.x);
  const uint4 words = wp::load_16_streaming(in + 4 * lane);
  const float values[4] = {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                           __uint_as_float(words.w)};
  uint32_t* to = out + 12 * lane;
  for (int i = 0; i < 2; ++i) {
    to[i] = wp::pack_word<Bf16>(values + 2 * i);
    to[2 + i] = wp::pack_word<Fp16>(values + 2 * i);
  }
  for (int i = 0; i < 4; ++i) {
    to[4 + i] = __float_as_uint(qlora_native::to_float(qlora_native::from_float<Fp16>(values[i])));
    to[8 + i] = __float_as_uint(qlora_native::to_float(qlora_native::from_float<Bf16>(values[i])));
  }
}

// fp32 arithmetic that must round as in IEEE 754, subnormals included. `in` as above.
__global__ void arithmetic(const uint32_t* in, uint32_t* out) {  // [32, 6]
  const int lane = static_cast<int>(threadIdx.x);
  const float x = __uint_as_float(in[4 * lane]);
  const float y = __uint_as_float(in[4 * lane + 1]);
  const float z = __uint_as_float(in[4 * lane + 2]);
  const float results[6] = {__fmul_rn(x, y), __fadd_rn(x, y), __fmaf_rn(x, y, z), x * y + z, y / x, sqrtf(x)};
  for (int i = 0; i < 6; ++i) {
    out[6 * lane + i] = __float_as_uint(results[i]);
  }
}

__global__ void warp_intrinsics(uint32_t* out) {  // [32, 8]
  const int lane = static_cast<int>(threadIdx.x);
  constexpr uint32_t kAll = 0xffffffffu;
  const auto value = static_cast<uint32_t>(lane * lane + 7);
  uint32_t* to = out + 8 * lane;
  to[0] = __shfl_xor_sync(kAll, value, 5);
  to[1] = __shfl_down_sync(kAll, value, 3);
  to[2] = __shfl_up_sync(kAll, value, 6);
  to[3] = __shfl_sync(kAll, value, 3 * lane % 32);
  to[4] = __shfl_xor_sync(kAll, value, 2, 8);
  to[5] = __ballot_sync(kAll, lane % 3 == 0);
  to[6] =
      __byte_perm(0x33221100u + static_cast<uint32_t>(lane), 0x77665544u, 0x6240u + static_cast<uint32_t>(lane % 8));
  to[7] = static_cast<uint32_t>(__popc(value));
}

// Sums over all lanes, in shared and in device memory.
__global__ void atomics(uint32_t* out) {  // [32, 1]
  WP_SHARED(unsigned, sum, 1);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 0) {
    sum[0] = 5;
  }
  __syncthreads();
  atomicAdd(&sum[0], static_cast<unsigned>(lane));
  __syncthreads();
  out[lane] = sum[0];
}

}  // namespace conformance
