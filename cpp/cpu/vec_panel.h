// The vector operations of the matrix products: codes to levels, rounding, and the step of a sum.
//
// A "word" is what one lane of a panel holds: an fp32 weight, or a pair of bf16 weights where there is a dot product of
// such pairs. Included by kernels-gemm-inl.h, inside the namespace of its instruction set.
#pragma once

#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

template <typename T>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<Bf16> = true;

#if defined(__AVX512BW__)

using Words = __m512i;
inline constexpr int kMicroRows = 12;  // a tile of sums: 12 x 2 registers, and 2 of the panel, 1 of x
inline constexpr int kTileVectors = 2;

inline Floats broadcast(const float* p) { return _mm512_set1_ps(*p); }
template <unsigned kBits>
inline Words shift_right(Words v) {
  return kBits == 0 ? v : _mm512_srli_epi32(v, kBits);
}

// bf16 kept in the upper half of an fp32, the lower half zero. A NaN must be the canonical one.
inline Words bf16_bits(Floats v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
template <typename T>
inline Floats round_through(Floats v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (kIsBf16<T>) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(v), upper));
  } else {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}
// Two vectors that round_through<Bf16> made, as pairs: `even` in the lower halves.
inline Floats pair_up(Floats even, Floats odd) {
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd)));
}

// The 16 levels; `at` looks at the lowest four bits of each lane.
struct LevelTable {
  __m512 level;
  explicit LevelTable(const float* levels) : level(load(levels)) {}
  template <typename T>
  LevelTable scaled(float scale) const {
    LevelTable result = *this;
    result.level = round_through<T>(multiply(level, _mm512_set1_ps(scale)));
    return result;
  }
  Floats at(Words codes) const { return _mm512_permutexvar_ps(codes, level); }
};

// The codes of kLanes elements in their order; the first is even where kLanes is.
inline Words natural_codes(const uint8_t* packed, int64_t element) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + element / 2));
  const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
  return _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32));
}

// Lane l of out[d] = bytes 4 d to 4 d + 3 of rows[l] + offset.
inline void transpose_codes(const uint8_t* const* rows, int64_t offset, Words* out) {
  const auto four = [&](int first) {
    const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
    __m512i v = _mm512_castsi128_si512(piece(first));
    v = _mm512_inserti32x4(v, piece(first + 4), 1);
    v = _mm512_inserti32x4(v, piece(first + 8), 2);
    return _mm512_inserti32x4(v, piece(first + 12), 3);
  };
  const __m512i a = four(0);
  const __m512i b = four(1);
  const __m512i c = four(2);
  const __m512i d = four(3);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_high = _mm512_unpackhi_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

#if defined(__AVX512BF16__)
// The scaled levels of two rows, rounded to bf16: 16 of the first, 16 of the second.
struct PairTable {
  __m512i level;
  PairTable(Floats levels, float scale, float scale_below)
      : level(std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(multiply(levels, _mm512_set1_ps(scale_below)),
                                                         multiply(levels, _mm512_set1_ps(scale))))) {}
  // Words of elements 16 half to 16 half + 15 of the rows' 32, in their order: the first row's in the lower halves.
  Floats at(const uint8_t* bytes, const uint8_t* bytes_below, int half) const {
    const auto piece = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    const __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(bytes)), piece(bytes_below), 1);
    const int64_t first = half == 0 ? 0x0008000000080000 : 0x000c0004000c0004;
    const __m512i four = _mm512_set_epi64(0x0003000300030003, 0x0003000300030003, 0x0002000200020002,
                                          0x0002000200020002, 0x0001000100010001, 0x0001000100010001, 0, 0);
    const __m512i taken = _mm512_add_epi16(four, _mm512_set1_epi64(first));
    const __m512i shift = _mm512_set4_epi32(0x00080008, 0x000c000c, 0, 0x00040004);
    const __m512i codes = _mm512_srlv_epi16(_mm512_permutexvar_epi16(taken, _mm512_castsi256_si512(rows)), shift);
    const __m512i index = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(15), _mm512_set1_epi32(0x100000), 0xea);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, level));
  }
};
#endif

inline void store_as(float* p, Floats v) { store(p, v); }
inline void store_as(Bf16* p, Floats v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(v)); }
inline void store_as(Fp16* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void prefetch(const void* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(p, _MM_HINT_T1); }

// v[i] lane j becomes v[j] lane i.
inline void transpose(Floats (&v)[kLanes]) {
  __m512i a[16];
  __m512i b[16];
  const auto bits = [&](int i) { return _mm512_castps_si512(v[i]); };
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(bits(i), bits(i + 1));
    a[i + 1] = _mm512_unpackhi_epi32(bits(i), bits(i + 1));
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + c]: column 4 q + c of rows i to i + 3, in quarter q
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee);
    v[c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low01, low23, 0x88));
    v[4 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low01, low23, 0xdd));
    v[8 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(high01, high23, 0x88));
    v[12 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

#elif defined(__AVX2__)

using Words = __m256i;
inline constexpr int kMicroRows = 6;
inline constexpr int kTileVectors = 2;

inline Floats broadcast(const float* p) { return _mm256_broadcast_ss(p); }
template <unsigned kBits>
inline Words shift_right(Words v) {
  return kBits == 0 ? v : _mm256_srli_epi32(v, kBits);
}

inline __m256i bf16_bits(Floats v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
template <typename T>
inline Floats round_through(Floats v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (kIsBf16<T>) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(v), upper));
  } else {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}
inline Floats pair_up(Floats even, Floats odd) {
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd)));
}

struct LevelTable {
  __m256 low;
  __m256 high;
  explicit LevelTable(const float* levels) : low(load(levels)), high(load(levels + 8)) {}
  template <typename T>
  LevelTable scaled(float scale) const {
    LevelTable result = *this;
    result.low = round_through<T>(multiply(low, _mm256_set1_ps(scale)));
    result.high = round_through<T>(multiply(high, _mm256_set1_ps(scale)));
    return result;
  }
  Floats at(Words codes) const {
    // Bits 0-2 choose within a half, bit 3, moved to the sign, between the halves.
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), half);
  }
};

inline Words natural_codes(const uint8_t* packed, int64_t element) {
  int32_t word = 0;
  std::memcpy(&word, packed + element / 2, sizeof word);
  return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}

inline void transpose_codes(const uint8_t* const* rows, int64_t offset, Words* out) {
  const auto two = [&](int first) {
    const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(piece(first)), piece(first + 4), 1);
  };
  const __m256i a = two(0);
  const __m256i b = two(1);
  const __m256i c = two(2);
  const __m256i d = two(3);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_high = _mm256_unpackhi_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}

inline void store_as(float* p, Floats v) { store(p, v); }
inline void store_as(Bf16* p, Floats v) {
  const __m256i quieted = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(bf16_bits(v), quieted, nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store_as(Fp16* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void prefetch(const void* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(p, _MM_HINT_T1); }

// v[i] lane j becomes v[j] lane i.
inline void transpose(Floats (&v)[kLanes]) {
  __m256 a[8];
  __m256 b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // b[i + c]: column 4 h + c of rows i to i + 3, in half h
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    v[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

#elif !defined(QLORA_NATIVE_NEON)  // one lane

using Words = uint32_t;
inline void transpose(Floats (&)[kLanes]) {}
inline constexpr int kMicroRows = 4;
inline constexpr int kTileVectors = 4;

inline Floats broadcast(const float* p) { return {*p}; }
template <unsigned kBits>
inline Words shift_right(Words v) {
  return v >> kBits;
}
template <typename T>
inline Floats round_through(Floats v) {
  return {to_float(from_float<T>(v.value))};
}
inline Floats pair_up(Floats even, Floats odd) {
  return {std::bit_cast<float>(std::bit_cast<uint32_t>(even.value) >> 16 | std::bit_cast<uint32_t>(odd.value))};
}

struct LevelTable {
  float level[16];
  explicit LevelTable(const float* levels) { std::memcpy(level, levels, sizeof level); }
  template <typename T>
  LevelTable scaled(float scale) const {
    LevelTable result = *this;
    for (float& value : result.level) {
      value = round_through<T>({value * scale}).value;
    }
    return result;
  }
  Floats at(Words codes) const { return {level[codes & 15]}; }
};

inline Words natural_codes(const uint8_t* packed, int64_t element) {
  return element % 2 == 0 ? packed[element / 2] >> 4 : packed[element / 2];
}
inline void transpose_codes(const uint8_t* const* rows, int64_t offset, Words* out) {
  std::memcpy(out, rows[0] + offset, 16);
}

template <typename T>
inline void store_as(T* p, Floats v) {
  *p = from_float<T>(v.value);
}
inline void prefetch(const void*) {}
inline void prefetch_far(const void*) {}

#endif

inline constexpr int kStrip = kTileVectors * kLanes;  // columns of a tile, and of a strip of a panel

// How a word of x meets a word of the panel.
struct ProductOfFloats {
  static constexpr int kElements = 1;  // elements of the reduction in a word
  static Floats step(Floats x, Floats w, Floats sum) { return multiply_add(x, w, sum); }
};

template <typename T>
struct WordProduct : ProductOfFloats {};

#if defined(__AVX512BF16__)
template <>
struct WordProduct<Bf16> {
  static constexpr int kElements = 2;
  static Floats step(Floats x, Floats w, Floats sum) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(x), std::bit_cast<__m512bh>(w));
  }
};
#elif defined(QLORA_NATIVE_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct WordProduct<Bf16> {
  static constexpr int kElements = 2;
  static Floats step(Floats x, Floats w, Floats sum) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(x), vreinterpretq_bf16_f32(w));
  }
};
#endif

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
