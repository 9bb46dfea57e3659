// Sixteen floats at a time on every instruction set, so that sums are taken in one order and the bytes agree.
//
// A register on AVX-512, two on AVX2, four on arm64, an array otherwise. A product and a sum are fused only by fused(),
// which every instruction set rounds once (the plain one calls fmaf). Sums run over sixteen partial sums, folded by
// halves.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.h"
#include "cpu/vec.h"

#if defined(QLORA_NATIVE_NEON)
#include "cpu/kernels-sixteen-neon-inl.h"
#endif

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

inline constexpr int64_t kSixteen = 16;

#if defined(__AVX512BW__)

struct Sixteen {
  __m512 v;
};
struct SixteenInts {
  __m512i v;
};

inline Sixteen splat(float x) { return {_mm512_set1_ps(x)}; }
inline Sixteen operator+(Sixteen a, Sixteen b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Sixteen operator-(Sixteen a, Sixteen b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Sixteen operator*(Sixteen a, Sixteen b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Sixteen operator/(Sixteen a, Sixteen b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Sixteen fused(Sixteen a, Sixteen b, Sixteen c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
// a > b ? a : b, and so on: with NaN in b the result is b.
inline Sixteen larger(Sixteen a, Sixteen b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Sixteen smaller(Sixteen a, Sixteen b) { return {_mm512_min_ps(a.v, b.v)}; }
inline SixteenInts bits_of(Sixteen a) { return {_mm512_castps_si512(a.v)}; }
inline SixteenInts operator+(SixteenInts a, int32_t b) { return {_mm512_add_epi32(a.v, _mm512_set1_epi32(b))}; }
inline SixteenInts operator-(SixteenInts a, SixteenInts b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline SixteenInts half_of(SixteenInts a) { return {_mm512_srai_epi32(a.v, 1)}; }
// 2^(a) as a float, for exponents of normal numbers.
inline Sixteen power_of_two(SixteenInts a) { return {_mm512_castsi512_ps(_mm512_slli_epi32((a + 127).v, 23))}; }

inline Sixteen load16(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Sixteen load16(const Bf16* p) { return {load(p)}; }
inline Sixteen load16(const Fp16* p) { return {load(p)}; }
inline void store16(float* p, Sixteen a) { _mm512_storeu_ps(p, a.v); }
inline void store16(Bf16* p, Sixteen a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(a.v)); }
inline void store16(Fp16* p, Sixteen a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

struct Sixteen {
  __m256 low, high;
};
struct SixteenInts {
  __m256i low, high;
};

inline Sixteen splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Sixteen operator+(Sixteen a, Sixteen b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Sixteen operator-(Sixteen a, Sixteen b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Sixteen operator*(Sixteen a, Sixteen b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Sixteen operator/(Sixteen a, Sixteen b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Sixteen fused(Sixteen a, Sixteen b, Sixteen c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Sixteen larger(Sixteen a, Sixteen b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Sixteen smaller(Sixteen a, Sixteen b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline SixteenInts bits_of(Sixteen a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline SixteenInts operator+(SixteenInts a, int32_t b) {
  const __m256i addend = _mm256_set1_epi32(b);
  return {_mm256_add_epi32(a.low, addend), _mm256_add_epi32(a.high, addend)};
}
inline SixteenInts operator-(SixteenInts a, SixteenInts b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
inline SixteenInts half_of(SixteenInts a) { return {_mm256_srai_epi32(a.low, 1), _mm256_srai_epi32(a.high, 1)}; }
inline Sixteen power_of_two(SixteenInts a) {
  const SixteenInts biased = a + 127;
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased.low, 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(biased.high, 23))};
}

template <typename T>
inline Sixteen load16(const T* p) {
  return {load(p), load(p + 8)};
}
inline void store16(float* p, Sixteen a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
inline void store16(Bf16* p, Sixteen a) {
  const __m256i mixed = _mm256_packus_epi32(bf16_words(a.low), bf16_words(a.high));  // by halves of 128 bits
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline void store16(Fp16* p, Sixteen a) {
  auto* target = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(target, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(target + 1, _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
}

#elif !defined(QLORA_NATIVE_NEON)

struct Sixteen {
  float v[16];
};
struct SixteenInts {
  int32_t v[16];
};

template <typename Out, typename Each>
inline Out sixteen_of(const Each& each) {
  Out out;
  for (int i = 0; i < 16; ++i) {
    out.v[i] = each(i);
  }
  return out;
}

inline Sixteen splat(float x) {
  return sixteen_of<Sixteen>([=](int) { return x; });
}
inline Sixteen operator+(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Sixteen operator-(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Sixteen operator*(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Sixteen operator/(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] / b.v[i]; });
}
inline Sixteen fused(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
  return sixteen_of<Sixteen>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Sixteen larger(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Sixteen smaller(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline SixteenInts bits_of(const Sixteen& a) {
  return sixteen_of<SixteenInts>([&](int i) { return std::bit_cast<int32_t>(a.v[i]); });
}
// Through unsigned numbers, which wrap as registers do.
inline int32_t wrapped(uint32_t x) { return static_cast<int32_t>(x); }
inline SixteenInts operator+(const SixteenInts& a, int32_t b) {
  return sixteen_of<SixteenInts>(
      [&](int i) { return wrapped(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b)); });
}
inline SixteenInts operator-(const SixteenInts& a, const SixteenInts& b) {
  return sixteen_of<SixteenInts>(
      [&](int i) { return wrapped(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])); });
}
inline SixteenInts half_of(const SixteenInts& a) {
  return sixteen_of<SixteenInts>([&](int i) { return a.v[i] >> 1; });
}
inline Sixteen power_of_two(const SixteenInts& a) {
  return sixteen_of<Sixteen>([&](int i) { return std::bit_cast<float>((static_cast<uint32_t>(a.v[i]) + 127u) << 23); });
}

template <typename T>
inline Sixteen load16(const T* p) {
  return sixteen_of<Sixteen>([=](int i) { return to_float(p[i]); });
}
template <typename T>
inline void store16(T* p, const Sixteen& a) {
  for (int i = 0; i < 16; ++i) {
    p[i] = from_float<T>(a.v[i]);
  }
}

#endif

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
#if defined(__AVX512BW__)
template <>
inline Sixteen rounded<Bf16>(Sixteen a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bf16(a.v)), 16))};
}
#endif

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

#if defined(__AVX2__)
// Lanes i and i + 8, then i + 4, i + 2, i + 1: the order of the plain version below.
inline __m256 fold_once(Sixteen a, bool sum) {
#if defined(__AVX512BW__)
  const __m256 low = _mm512_castps512_ps256(a.v);
  const __m256 high = _mm512_extractf32x8_ps(a.v, 1);
#else
  const __m256 low = a.low;
  const __m256 high = a.high;
#endif
  return sum ? _mm256_add_ps(low, high) : _mm256_max_ps(low, high);
}
inline float sum16(Sixteen a) {
  const __m256 eight = fold_once(a, true);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max16(Sixteen a) {
  const __m256 eight = fold_once(a, false);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#elif !defined(QLORA_NATIVE_NEON)
template <typename Fold>
inline float folded(const Sixteen& a, const Fold& fold) {
  Sixteen lane = a;
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) {
      lane.v[i] = fold(lane.v[i], lane.v[i + step]);
    }
  }
  return lane.v[0];
}
inline float sum16(const Sixteen& a) {
  return folded(a, [](float x, float y) { return x + y; });
}
inline float max16(const Sixteen& a) {
  return folded(a, [](float x, float y) { return x > y ? x : y; });
}
#endif

// e^x to 1.5 units in the last place over the whole range: e^x = 2^n e^r with n the integer nearest to x / ln 2, e^r
// from the polynomial of S. Moshier's Cephes library (expf). Subnormal results are rounded once; NaN stays NaN.
inline Sixteen exp16(Sixteen x) {
  // Outside, e^x rounds to zero or overflows anyway. The operand order keeps NaN.
  const Sixteen in = larger(splat(-104.0f), smaller(splat(89.0f), x));
  const Sixteen magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Sixteen shifted = fused(in, splat(1.44269504088896341f), magic);
  const Sixteen n = shifted - magic;
  const Sixteen r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), in));  // ln 2 in two parts
  Sixteen p = splat(1.9875691500e-4f);
  p = fused(p, r, splat(1.3981999507e-3f));
  p = fused(p, r, splat(8.3334519073e-3f));
  p = fused(p, r, splat(4.1665795894e-2f));
  p = fused(p, r, splat(1.6666665459e-1f));
  p = fused(p, r, splat(5.0000001201e-1f));
  p = fused(p, r * r, r) + splat(1.0f);
  const SixteenInts exponent = bits_of(shifted) - bits_of(magic);
  const SixteenInts half = half_of(exponent);
  return (p * power_of_two(half)) * power_of_two(exponent - half);
}

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
