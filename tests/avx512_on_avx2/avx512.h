// The AVX-512 intrinsics (F, BW, DQ, VL) that the kernels use, on AVX2: GCC's vector types and pairs of 256-bit halves.
//
// cmake/cpu.cmake includes this before a kernel source where QLORA_NATIVE_EMULATE_ISAS is on. What stands here in the
// kernels' namespace hides the compiler's intrinsics of the same names; one that is missing does not compile, because
// the compiler's own needs flags that are not given. Semantics: Intel SDM vol. 2; every bit as on silicon
// (tests/cpp/test_silicon.cc). Where the SDM leaves bits undefined, they are garbage.
#pragma once

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#define __AVX512BW__ 1  // what cpp/cpu asks for; only now, so that the compiler's headers have not seen it

namespace qlora_native::cpu {
namespace {

using Words16 = uint16_t __attribute__((vector_size(64)));
using Signed32 = int32_t __attribute__((vector_size(64)));
using Words32 = uint32_t __attribute__((vector_size(64)));
using Words64 = uint64_t __attribute__((vector_size(64)));

struct Halves {
  __m256 low, high;
};
struct IntHalves {
  __m256i low, high;
};
inline Halves halves(__m512 v) { return std::bit_cast<Halves>(v); }
inline IntHalves halves(__m512i v) { return std::bit_cast<IntHalves>(v); }
inline __m512 join(__m256 low, __m256 high) { return std::bit_cast<__m512>(Halves{low, high}); }
inline __m512i join(__m256i low, __m256i high) { return std::bit_cast<__m512i>(IntHalves{low, high}); }
inline const __m256i kGarbage = _mm256_set1_epi32(0x7fa5a5a5);  // NaN as floats

// Lane i is `value(i)`.
template <typename Lanes, typename Value>
inline Lanes lanes(const Value& value) {
  Lanes made{};
  for (unsigned i = 0; i < sizeof(Lanes) / sizeof made[0]; ++i) {
    made[i] = value(i);
  }
  return made;
}
template <typename Lanes>
inline Lanes select(uint64_t mask, Lanes yes, Lanes no) {
  return lanes<Lanes>([&](unsigned i) { return (mask >> i & 1) != 0 ? yes[i] : no[i]; });
}
template <typename Lanes>
inline uint64_t mask_of(Lanes set) {
  uint64_t mask = 0;
  for (unsigned i = 0; i < sizeof(Lanes) / sizeof set[0]; ++i) {
    mask |= uint64_t{set[i] != 0} << i;
  }
  return mask;
}
// Elements whose bit is not set are not touched, and 0 in the result.
template <typename Vector, typename Element>
inline Vector load_masked(uint64_t mask, const void* from) {
  Element made[sizeof(Vector) / sizeof(Element)] = {};
  for (size_t i = 0; i < std::size(made); ++i) {
    if ((mask >> i & 1) != 0) {
      std::memcpy(made + i, static_cast<const Element*>(from) + i, sizeof(Element));
    }
  }
  return std::bit_cast<Vector>(made);
}
template <typename Element, typename Vector>
inline void store_masked(void* to, uint64_t mask, Vector v) {
  for (size_t i = 0; i < sizeof(Vector) / sizeof(Element); ++i) {
    if ((mask >> i & 1) != 0) {
      std::memcpy(static_cast<Element*>(to) + i, reinterpret_cast<const char*>(&v) + i * sizeof(Element),
                  sizeof(Element));
    }
  }
}
inline void check_aligned(const void* p) {  // the CPU raises #GP
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) {
    __builtin_trap();
  }
}

// Within 128 bits, or lane by lane: the halves are independent.
#define QLORA_NATIVE_UNARY(Out, name, In) \
  inline Out _mm512_##name(In a) { return join(_mm256_##name(halves(a).low), _mm256_##name(halves(a).high)); }
#define QLORA_NATIVE_BINARY(V, name)                                                                         \
  inline V _mm512_##name(V a, V b) {                                                                         \
    return join(_mm256_##name(halves(a).low, halves(b).low), _mm256_##name(halves(a).high, halves(b).high)); \
  }
QLORA_NATIVE_BINARY(__m512, add_ps)
QLORA_NATIVE_BINARY(__m512, sub_ps)
QLORA_NATIVE_BINARY(__m512, mul_ps)
QLORA_NATIVE_BINARY(__m512, div_ps)
QLORA_NATIVE_BINARY(__m512, max_ps)
QLORA_NATIVE_BINARY(__m512, min_ps)
QLORA_NATIVE_BINARY(__m512, and_ps)
QLORA_NATIVE_BINARY(__m512, unpacklo_ps)
QLORA_NATIVE_BINARY(__m512, unpackhi_ps)
QLORA_NATIVE_BINARY(__m512i, add_epi16)
QLORA_NATIVE_BINARY(__m512i, add_epi32)
QLORA_NATIVE_BINARY(__m512i, sub_epi32)
QLORA_NATIVE_BINARY(__m512i, max_epi32)
QLORA_NATIVE_BINARY(__m512i, max_epu32)
QLORA_NATIVE_BINARY(__m512i, max_epu16)
QLORA_NATIVE_BINARY(__m512i, packs_epi16)
QLORA_NATIVE_BINARY(__m512i, packs_epi32)
QLORA_NATIVE_BINARY(__m512i, packus_epi16)
QLORA_NATIVE_BINARY(__m512i, packus_epi32)
QLORA_NATIVE_BINARY(__m512i, shuffle_epi8)
QLORA_NATIVE_BINARY(__m512i, srlv_epi32)
QLORA_NATIVE_BINARY(__m512i, unpacklo_epi32)
QLORA_NATIVE_BINARY(__m512i, unpackhi_epi32)
QLORA_NATIVE_BINARY(__m512i, unpacklo_epi64)
QLORA_NATIVE_BINARY(__m512i, unpackhi_epi64)
QLORA_NATIVE_UNARY(__m512, sqrt_ps, __m512)
QLORA_NATIVE_UNARY(__m512i, cvtps_epi32, __m512)
QLORA_NATIVE_UNARY(__m512, cvtepi32_ps, __m512i)
#undef QLORA_NATIVE_UNARY
#undef QLORA_NATIVE_BINARY

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return join(_mm256_fmadd_ps(halves(a).low, halves(b).low, halves(c).low),
              _mm256_fmadd_ps(halves(a).high, halves(b).high, halves(c).high));
}

// Casts, and values from scalars
inline __m512i _mm512_castps_si512(__m512 a) { return __m512i(a); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return __m512(a); }
inline __m512d _mm512_castps_pd(__m512 a) { return __m512d(a); }
inline __m512 _mm512_castpd_ps(__m512d a) { return __m512(a); }
inline __m256 _mm512_castps512_ps256(__m512 a) { return halves(a).low; }
inline __m256i _mm512_castsi512_si256(__m512i a) { return halves(a).low; }
inline __m128i _mm512_castsi512_si128(__m512i a) { return _mm256_castsi256_si128(halves(a).low); }
inline __m512i _mm512_castsi256_si512(__m256i a) { return join(a, kGarbage); }
inline __m512i _mm512_castsi128_si512(__m128i a) { return join(_mm256_inserti128_si256(kGarbage, a, 0), kGarbage); }
inline __m512i _mm512_zextsi256_si512(__m256i a) { return join(a, __m256i{}); }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512d _mm512_setzero_pd() { return __m512d{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float x) { return join(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline __m512i _mm512_set1_epi16(short x) { return join(_mm256_set1_epi16(x), _mm256_set1_epi16(x)); }
inline __m512i _mm512_set1_epi32(int x) { return join(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
inline __m512i _mm512_set1_epi64(long long x) { return join(_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)); }
template <typename... Lane>
inline __m512i _mm512_set_epi32(Lane... lane) {  // _mm512_setr_epi32 is a macro over it
  const std::array<int, 16> last_first{lane...};
  return __m512i(lanes<Signed32>([&](unsigned i) { return last_first[15 - i]; }));
}
inline __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
  return _mm512_set_epi32(d, c, b, a, d, c, b, a, d, c, b, a, d, c, b, a);
}
template <typename... Lane>
inline __m512i _mm512_set_epi64(Lane... lane) {
  const std::array<int64_t, 8> last_first{lane...};
  return lanes<__m512i>([&](unsigned i) { return last_first[7 - i]; });
}
inline __m512 _mm512_broadcast_f32x8(__m256 a) { return join(a, a); }
inline __m512i _mm512_broadcast_i64x4(__m256i a) { return join(a, a); }
inline __m512i _mm512_broadcast_i32x4(__m128i a) { return _mm512_broadcast_i64x4(_mm256_broadcastsi128_si256(a)); }
inline __m512i _mm512_broadcastd_epi32(__m128i a) { return _mm512_set1_epi32(_mm_cvtsi128_si32(a)); }

// Memory
inline __m512 _mm512_loadu_ps(const void* p) { return load_masked<__m512, __m512>(1, p); }
inline __m512i _mm512_loadu_si512(const void* p) { return load_masked<__m512i, __m512i>(1, p); }
inline __m512i _mm512_load_si512(const void* p) {
  check_aligned(p);
  return _mm512_loadu_si512(p);
}
inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
inline void _mm512_storeu_pd(void* p, __m512d v) { std::memcpy(p, &v, sizeof v); }
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
inline void _mm512_store_si512(void* p, __m512i v) {
  check_aligned(p);
  _mm512_storeu_si512(p, v);
}
inline void _mm512_stream_si512(__m512i* p, __m512i v) {
  check_aligned(p);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves(v).low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, halves(v).high);
}
inline __m128i _mm_maskz_loadu_epi16(__mmask8 k, const void* p) { return load_masked<__m128i, uint16_t>(k, p); }
inline __m256i _mm256_maskz_loadu_epi8(__mmask32 k, const void* p) { return load_masked<__m256i, uint8_t>(k, p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) { return load_masked<__m256i, uint16_t>(k, p); }
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const void* p) { return load_masked<__m512i, uint16_t>(k, p); }
inline void _mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 v) { store_masked<float>(p, k, v); }
inline void _mm512_mask_storeu_epi16(void* p, __mmask32 k, __m512i v) { store_masked<uint16_t>(p, k, v); }
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i v) { store_masked<uint16_t>(p, k, v); }
inline __m512i _mm512_i32gather_epi32(__m512i index, const void* base, int scale) {
  return __m512i(lanes<Signed32>([&](unsigned i) {
    int32_t word = 0;
    std::memcpy(&word, static_cast<const char*>(base) + int64_t{Signed32(index)[i]} * scale, sizeof word);
    return word;
  }));
}
inline __m512 _mm512_i32gather_ps(__m512i index, const void* base, int scale) {
  return __m512(_mm512_i32gather_epi32(index, base, scale));
}

// Bits
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512 _mm512_abs_ps(__m512 a) { return __m512(Words32(a) & 0x7fffffffu); }
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return __m512i(Words32(a) << n); }
inline __m512i _mm512_slli_epi64(__m512i a, unsigned n) { return __m512i(Words64(a) << n); }
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) { return __m512i(Words16(a) >> static_cast<uint16_t>(n)); }
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return __m512i(Words32(a) >> n); }
inline __m512i _mm512_srli_epi64(__m512i a, unsigned n) { return __m512i(Words64(a) >> n); }
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) { return __m512i(Signed32(a) >> static_cast<int>(n)); }
inline __m512i _mm512_srlv_epi16(__m512i a, __m512i n) {
  return __m512i(lanes<Words16>(
      [&](unsigned i) { return static_cast<uint16_t>(Words16(n)[i] < 16 ? Words16(a)[i] >> Words16(n)[i] : 0); }));
}
// Bit 4 a + 2 b + c of the table, for each bit of the three.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i made{};
  for (int row = 0; row < 8; ++row) {
    if ((table >> row & 1) != 0) {
      made |= ((row & 4) != 0 ? a : ~a) & ((row & 2) != 0 ? b : ~b) & ((row & 1) != 0 ? c : ~c);
    }
  }
  return made;
}

// Conversions
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline __m512i _mm512_cvtepu8_epi16(__m256i a) {
  return join(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)));
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return join(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
inline __m512i _mm512_cvtepu8_epi64(__m128i a) {
  return join(_mm256_cvtepu8_epi64(a), _mm256_cvtepu8_epi64(_mm_srli_si128(a, 4)));
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {  // the low half of each lane
  using Narrow = uint16_t __attribute__((vector_size(32)));
  return __m256i(__builtin_convertvector(Words32(a), Narrow));
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  using Narrow = uint8_t __attribute__((vector_size(16)));
  return __m128i(__builtin_convertvector(Words32(a), Narrow));
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
inline __m256i _mm512_cvtps_ph(__m512 a, int) {  // to nearest, which is all that the kernels ask for
  return _mm256_set_m128i(_mm256_cvtps_ph(halves(a).high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves(a).low, _MM_FROUND_TO_NEAREST_INT));
}
inline __m512d _mm512_cvtps_pd(__m256 a) { return __builtin_convertvector(a, __m512d); }
inline __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return lanes<__m512d>([&](unsigned i) { return __builtin_fma(a[i], b[i], c[i]); });
}

// Permutations. GCC takes an index modulo the number of elements, as the CPU does.
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  return __m512i(__builtin_shuffle(Words16(a), Words16(index)));
}
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
  return __m512i(__builtin_shuffle(Words32(a), Words32(index)));
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) { return __builtin_shuffle(a, Signed32(index)); }
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  return __m512i(__builtin_shuffle(Words16(a), Words16(b), Words16(index)));
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
  return __m512i(__builtin_shuffle(Words32(a), Words32(b), Words32(index)));
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return __builtin_shuffle(a, b, Signed32(index));
}
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
  return __m512d(_mm512_unpacklo_epi64(__m512i(a), __m512i(b)));
}
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
  return __m512d(_mm512_unpackhi_epi64(__m512i(a), __m512i(b)));
}

struct Quarters {
  __m128i at[4];
};
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
  const auto [of_a, of_b] = std::array{std::bit_cast<Quarters>(a), std::bit_cast<Quarters>(b)};
  return std::bit_cast<__m512i>(
      Quarters{of_a.at[which & 3], of_a.at[which >> 2 & 3], of_b.at[which >> 4 & 3], of_b.at[which >> 6 & 3]});
}
inline __m512i _mm512_inserti32x4(__m512i a, __m128i quarter, int which) {
  auto quarters = std::bit_cast<Quarters>(a);
  quarters.at[which] = quarter;
  return std::bit_cast<__m512i>(quarters);
}
inline __m512i _mm512_inserti64x4(__m512i a, __m256i half, int which) {
  return which == 0 ? join(half, halves(a).high) : join(halves(a).low, half);
}
inline __m128i _mm512_extracti32x4_epi32(__m512i a, int which) { return std::bit_cast<Quarters>(a).at[which]; }
inline __m256i _mm512_extracti64x4_epi64(__m512i a, int which) { return which == 0 ? halves(a).low : halves(a).high; }
inline __m256 _mm512_extractf32x8_ps(__m512 a, int which) { return which == 0 ? halves(a).low : halves(a).high; }

// Masks
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  const auto mask = [&](auto set) { return static_cast<__mmask16>(mask_of(set)); };
  switch (how) {
    case _CMP_LT_OQ:
      return mask(a < b);
    case _CMP_UNORD_Q:
      return mask((a != a) | (b != b));
    case _CMP_NEQ_OQ:
      return mask((a < b) | (a > b));
    default:
      __builtin_trap();
  }
}
inline __mmask16 _mm512_cmpgt_epu32_mask(__m512i a, __m512i b) {
  return static_cast<__mmask16>(mask_of(Words32(a) > Words32(b)));
}
inline __mmask16 _mm512_movepi32_mask(__m512i a) { return static_cast<__mmask16>(mask_of(Signed32(a) < 0)); }
inline __mmask32 _mm512_test_epi16_mask(__m512i a, __m512i b) {
  return static_cast<__mmask32>(mask_of(Words16(a & b)));
}
inline __m512i _mm512_mask_mov_epi32(__m512i other, __mmask16 k, __m512i a) {
  return __m512i(select(k, Words32(a), Words32(other)));
}
inline __m512i _mm512_mask_mov_epi16(__m512i other, __mmask32 k, __m512i a) {
  return __m512i(select(k, Words16(a), Words16(other)));
}
inline __m512i _mm512_mask_blend_epi16(__mmask32 k, __m512i a, __m512i b) { return _mm512_mask_mov_epi16(a, k, b); }
inline __m256 _mm256_mask_blend_ps(__mmask8 k, __m256 a, __m256 b) { return select(k, b, a); }
inline __m512i _mm512_mask_or_epi32(__m512i other, __mmask16 k, __m512i a, __m512i b) {
  return _mm512_mask_mov_epi32(other, k, a | b);
}
inline __m512i _mm512_mask_add_epi32(__m512i other, __mmask16 k, __m512i a, __m512i b) {
  return _mm512_mask_mov_epi32(other, k, _mm512_add_epi32(a, b));
}
inline __m512i _mm512_mask_permutexvar_epi32(__m512i other, __mmask16 k, __m512i index, __m512i a) {
  return _mm512_mask_mov_epi32(other, k, _mm512_permutexvar_epi32(index, a));
}
inline __m512i _mm512_mask_broadcastd_epi32(__m512i other, __mmask16 k, __m128i a) {
  return _mm512_mask_mov_epi32(other, k, _mm512_broadcastd_epi32(a));
}
inline __m512 _mm512_maskz_xor_ps(__mmask16 k, __m512 a, __m512 b) {
  return __m512(select(k, Words32(a) ^ Words32(b), Words32{}));
}
// The larger magnitude with the sign of the first, which is all that the kernels ask for; a quiet NaN is passed over.
inline __m512 _mm512_range_ps(__m512 a, __m512 b, int how) {
  if (how != 3) {
    __builtin_trap();
  }
  const __m512 x = _mm512_abs_ps(a);
  const __m512 y = _mm512_abs_ps(b);
  const __m512 larger = __m512((x >= y) | (y != y) ? Words32(x) : Words32(y));
  return __m512(Words32(larger) | (Words32(a) & 0x80000000u));
}

// Sums of the halves, of their halves and so on, as GCC orders them.
template <typename Op>
inline auto reduced(auto v, const Op& op) {
  for (unsigned left = 8; left > 0; left /= 2) {
    for (unsigned i = 0; i < left; ++i) {
      v[i] = op(v[i + left], v[i]);
    }
  }
  return v[0];
}
inline float _mm512_reduce_add_ps(__m512 a) {
  return reduced(a, [](float x, float y) { return x + y; });
}
inline uint32_t _mm512_reduce_max_epu32(__m512i a) {
  return reduced(Words32(a), [](uint32_t x, uint32_t y) { return x > y ? x : y; });
}

}  // namespace
}  // namespace qlora_native::cpu
