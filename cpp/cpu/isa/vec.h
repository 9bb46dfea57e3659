// The vector operations that the kernels are written in, for the instruction set this file is compiled with.
//
// A new instruction set is a file vec-<isa>.h and a kernels/quantize-<isa>-inl.h, with all that the others define, and
// three lines here. Included by kernels/all-inl.h inside a namespace of its own per instruction set, so that no two
// object files share a function compiled with different flags. AVX-512 here means F + BW + DQ + VL.
//
//   Floats         kLanes floats, as many as a register holds
//   Words          what the lanes of a panel of weights hold: fp32, or a pair of bf16 where pairs have a dot product
//   Sixteen        16 floats on every instruction set, so that sums are taken in one order and the bytes agree. A
//                  product and a sum are fused only by fused(), which rounds once everywhere (the plain one calls fmaf)
//   of optimizers  every operation rounds once: nothing is fused unless the product is exact
#pragma once

#include <cstdint>
#include <cstring>

#include "core/arithmetic.h"
#include "core/exp.h"
#include "core/half.h"
#include "core/optim.h"
#include "core/state_code.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

using Bytes16 = uint8_t __attribute__((vector_size(16)));

template <typename T>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<Bf16> = true;

// What a file of an instruction set may specialize: the table of a block's 16 levels, scaled and rounded to T once, so
// that decoding is a look-up, exact by construction; a step of a sum; how a word of x meets a word of the panel.
template <typename T>
class Decoder;
template <typename T>
struct Dot;
template <typename T>
struct WordProduct;

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE

#if defined(__AVX512BW__)
#include "cpu/isa/vec-avx512.h"
#define QLORA_NATIVE_QUANTIZE_INL "cpu/kernels/quantize-avx512-inl.h"
#elif defined(__AVX2__)
#include "cpu/isa/vec-avx2.h"
#define QLORA_NATIVE_QUANTIZE_INL "cpu/kernels/quantize-avx2-inl.h"
#elif defined(QLORA_NATIVE_NEON)
#include "cpu/isa/vec-neon.h"
#define QLORA_NATIVE_QUANTIZE_INL "cpu/kernels/quantize-neon-inl.h"
#else
#include "cpu/isa/vec-scalar.h"
#define QLORA_NATIVE_QUANTIZE_INL "cpu/kernels/quantize-scalar-inl.h"
#endif

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

// An fp16 at any address.
inline float load_half(const uint8_t* p) {
  Fp16 half{};
  std::memcpy(&half, p, sizeof half);
#if defined(__AVX2__)
  return _cvtsh_ss(half.bits);  // one instruction in place of ten
#else
  return to_float(half);
#endif
}

#if defined(__AVX2__)
// table[code] of 16 codes, 0 to 15.
inline Bytes16 look_up_16(const int8_t* table, Bytes16 codes) {
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return std::bit_cast<Bytes16>(_mm_shuffle_epi8(levels, std::bit_cast<__m128i>(codes)));
}
#else
// Words of 32 bits, [16, 16] from `in` on, rows `stride` bytes apart, transposed.
inline void transpose_16(const void* in, int64_t stride, Sixteen* out) {
  for (int64_t i = 0; i < 16; ++i) {
    float column[16];
    for (int64_t j = 0; j < 16; ++j) {
      std::memcpy(column + j, static_cast<const unsigned char*>(in) + j * stride + 4 * i, sizeof(float));
    }
    out[i] = load16(column);
  }
}
#endif

inline Floats broadcast(const float* p) { return all(*p); }
inline Floats normalize(Floats v, const Normalizer& by) {
  return by.divides ? divide(v, all(by.factor)) : multiply(v, all(by.factor));
}
// To the first cache, and to the second. One lane is too slow to wait for memory.
inline void prefetch(const void* p) {
  if constexpr (kLanes > 1) {
    __builtin_prefetch(p, 0, 3);
  }
}
inline void prefetch_far(const void* p) {
  if constexpr (kLanes > 1) {
    __builtin_prefetch(p, 0, 2);
  }
}

// One step of an inner product of kStep elements, summed in fp32.
template <typename T>
struct Dot {
  static constexpr int kStep = kLanes;
  static Floats load_operand(const T* p) { return load(p); }
  static Floats step(Floats a, Floats b, Floats sum) { return multiply_add(a, b, sum); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Panels

inline constexpr int kStrip = kTileVectors * kLanes;  // columns of a tile, and of a strip of a panel

struct ProductOfFloats {
  static constexpr int kElements = 1;  // elements of the reduction in a word
  static Floats step(Floats x, Floats w, Floats sum) { return multiply_add(x, w, sum); }
};

template <typename T>
struct WordProduct : ProductOfFloats {};

// ---------------------------------------------------------------------------------------------------------------------
// Sixteen lanes

inline constexpr int64_t kSixteen = 16;

// Rounded to T and widened again: where a chain of 16-bit ops would have rounded.
template <typename T>
inline Sixteen rounded(Sixteen a) {
  T words[kSixteen];
  store16(words, a);
  return load16(words);
}
template <>
inline Sixteen rounded<float>(Sixteen a) {
  return a;
}

// The first `count` < 16 elements, and `fill` for the rest.
template <typename T>
inline Sixteen load_some(const T* p, int64_t count, float fill) {
  float padded[kSixteen];
  for (int64_t i = 0; i < kSixteen; ++i) {
    padded[i] = i < count ? to_float(p[i]) : fill;
  }
  return load16(padded);
}

template <typename T>
inline void store_some(T* p, int64_t count, Sixteen a) {
  T words[kSixteen];
  store16(words, a);
  for (int64_t i = 0; i < count; ++i) {
    p[i] = words[i];
  }
}

// each(i, load, store) for whole groups of sixteen in [0, count) and then for what is left. load(p, fill) reads p[i..],
// store(p, value) writes there, both only as far as `count`.
template <typename Each>
inline void by_sixteen(int64_t count, const Each& each) {
  int64_t i = 0;
  for (; i + kSixteen <= count; i += kSixteen) {
    each([i](const auto* p, float) { return load16(p + i); }, [i](auto* p, Sixteen a) { store16(p + i, a); });
  }
  if (i < count) {
    const int64_t left = count - i;
    each([i, left](const auto* p, float fill) { return load_some(p + i, left, fill); },
         [i, left](auto* p, Sixteen a) { store_some(p + i, left, a); });
  }
}

// e^x to 1.5 units in the last place over the whole range. Subnormal results are rounded once; NaN stays NaN.
inline Sixteen exp16(Sixteen x) {
  const Sixteen in = larger(splat(kExp.lowest), smaller(splat(kExp.highest), x));  // the operand order keeps NaN
  const Sixteen magic = splat(kExp.magic);
  const Sixteen shifted = fused(in, splat(kExp.per_ln2), magic);
  const Sixteen n = shifted - magic;
  const Sixteen r = fused(n, splat(kExp.ln2_too_much), fused(n, splat(kExp.minus_ln2), in));
  Sixteen p = splat(kExp.terms[0]);
  for (int i = 1; i < 6; ++i) {
    p = fused(p, r, splat(kExp.terms[i]));
  }
  p = fused(p, r * r, r) + splat(1.0f);
  const SixteenInts exponent = bits_of(shifted) - bits_of(magic);
  const SixteenInts half = half_of(exponent);
  return (p * power_of_two(half)) * power_of_two(exponent - half);
}

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
