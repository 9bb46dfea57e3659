// The AVX512-BF16 intrinsics that the kernels use, on AVX2, beside those of avx512.h.
//
// VDPBF16PS adds the product of the odd elements, then that of the even ones, each by a fused multiply-add: so an AMD
// Zen 4 did in 25 million sums of random bits, NaNs included.
#pragma once

#include "avx512.h"

#define __AVX512BF16__ 1

namespace qlora_native::cpu {
namespace {

// Subnormal numbers count as zero and results are never subnormal (DAZ, FTZ), whatever MXCSR says: within this scope it
// says so. `through` keeps the compiler from moving arithmetic across its ends.
class FlushSubnormals {
 public:
  FlushSubnormals() { _mm_setcsr(0x9fc0); }  // to nearest, no exception
  ~FlushSubnormals() { _mm_setcsr(mxcsr_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
  static __m256 through(__m256 v) {
    __asm__ volatile("" : "+x"(v));
    return v;
  }

 private:
  unsigned mxcsr_ = _mm_getcsr();
};

inline __m256 even_elements(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd_elements(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const FlushSubnormals scope;
  const auto half = [](__m256 s, __m256i x, __m256i y) {
    s = _mm256_fmadd_ps(odd_elements(x), odd_elements(y), FlushSubnormals::through(s));
    return FlushSubnormals::through(_mm256_fmadd_ps(even_elements(x), even_elements(y), s));
  };
  const IntHalves x = halves(std::bit_cast<__m512i>(a));
  const IntHalves y = halves(std::bit_cast<__m512i>(b));
  return join(half(halves(sum).low, x.low, y.low), half(halves(sum).high, x.high, y.high));
}

// To nearest even; a NaN is made quiet and keeps its upper bits, subnormal numbers become zero.
inline Words32 bf16_of(__m512 v) {
  const Words32 bits = Words32(v);
  const Words32 magnitude = bits & 0x7fffffffu;
  const Words32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words32 finite = magnitude < 0x00800000u ? bits >> 31 << 15 : rounded;
  return magnitude > 0x7f800000u ? bits >> 16 | 0x40u : finite;
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  return std::bit_cast<__m256bh>(_mm512_cvtepi32_epi16(__m512i(bf16_of(a))));
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return std::bit_cast<__m512bh>(
      join(_mm512_cvtepi32_epi16(__m512i(bf16_of(low))), _mm512_cvtepi32_epi16(__m512i(bf16_of(high)))));
}

}  // namespace
}  // namespace qlora_native::cpu
