// The few vector operations that the kernels are written in, for the instruction set this file is compiled with.
//
// Included by kernels-inl.h inside a namespace of its own per instruction set, so that no two object files share a
// function compiled with different flags. AVX-512 here means F + BW + DQ + VL.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/arithmetic.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(QLORA_NATIVE_NEON)
#include "cpu/vec_neon.h"
#endif

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

#if defined(__AVX512BW__)

using Floats = __m512;
inline constexpr int kLanes = 16;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Floats load(const Fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Floats v) { return _mm512_reduce_add_ps(v); }

// Magnitudes of IEEE floats are ordered like their bits, and anything non-finite lies above all finite values.
struct MagnitudeMax {
  __m512i bits = _mm512_setzero_si512();
  void update(Floats v) {
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  uint32_t reduce() const { return _mm512_reduce_max_epu32(bits); }
};

inline Floats normalise(Floats v, const Normaliser& by) {
  const Floats factor = _mm512_set1_ps(by.factor);
  return by.divides ? _mm512_div_ps(v, factor) : _mm512_mul_ps(v, factor);
}

// How many of the sorted table's first `2 * first_step - 1` entries lie strictly below each lane, by bisection.
inline __m512i rank_in(__m512 table, Floats v, int first_step) {
  __m512i rank = _mm512_setzero_si512();
  for (int step = first_step; step > 0; step >>= 1) {
    const __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
    const __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(probe, table), v, _CMP_LT_OQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
  }
  return rank;
}

inline void store_codes(uint8_t* p, __m512i codes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
}

inline void nf4_codes(Floats v, uint8_t* codes) {
  static constexpr Nf4Boundaries boundaries = nf4_boundaries();
  store_codes(codes, rank_in(_mm512_loadu_ps(boundaries.value), v, 8));
}

inline void fp4_codes(Floats v, uint8_t* codes) {
  static constexpr Fp4Pivots pivots = fp4_pivots();
  static constexpr Fp4CodeOfRank code_of_rank = fp4_code_of_rank();
  const __m512 table = _mm512_broadcast_f32x8(_mm256_loadu_ps(pivots.value));
  const __m512i rank = rank_in(table, _mm512_abs_ps(v), 4);
  const __m512i map = _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code_of_rank.code)));
  const __mmask16 negative = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512i code = _mm512_permutexvar_epi32(rank, map);
  store_codes(codes, _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8)));
}

// The 16 levels of one block, scaled and rounded to T once: decoding is then a table look-up, exact by construction.
template <typename T>
class Decoder;

template <>
class Decoder<float> {
 public:
  static constexpr int kBytes = 8;  // packed bytes a step
  Decoder(const float* levels, float scale) : table_(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale))) {}
  void step(const uint8_t* bytes, float* out) const {
    const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    // permutexvar looks at four bits of each 32-bit index, so the high nibble above the low one does no harm.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(index, table_));
  }

 private:
  __m512 table_;
};

inline __m256i round_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quieted = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quieted), 16));
}

class Decoder16 {
 public:
  static constexpr int kBytes = 16;
  explicit Decoder16(__m256i words) : table_(_mm512_broadcast_i64x4(words)) {}
  void step(const uint8_t* bytes, void* out) const {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    // vpermw looks at five bits; the table stands there twice, so the fifth is free.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table_));
  }

 private:
  __m512i table_;
};

template <>
class Decoder<Bf16> : public Decoder16 {
 public:
  Decoder(const float* levels, float scale)
      : Decoder16(round_to_bf16(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale)))) {}
};

template <>
class Decoder<Fp16> : public Decoder16 {
 public:
  Decoder(const float* levels, float scale)
      : Decoder16(_mm512_cvtps_ph(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT)) {}
};

#elif defined(__AVX2__)

using Floats = __m256;
inline constexpr int kLanes = 8;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Floats load(const Fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Floats v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

struct MagnitudeMax {
  __m256i bits = _mm256_setzero_si256();
  void update(Floats v) {
    bits = _mm256_max_epu32(bits, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
  }
  uint32_t reduce() const {
    alignas(32) uint32_t lane[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), bits);
    uint32_t highest = 0;
    for (const uint32_t value : lane) {
      highest = value > highest ? value : highest;
    }
    return highest;
  }
};

inline Floats normalise(Floats v, const Normaliser& by) {
  const Floats factor = _mm256_set1_ps(by.factor);
  return by.divides ? _mm256_div_ps(v, factor) : _mm256_mul_ps(v, factor);
}

// Counts the table's entries strictly below each lane; a true comparison is -1.
template <int kEntries>
inline __m256i rank_in(const float* table, Floats v) {
  __m256i rank = _mm256_setzero_si256();
  for (int i = 0; i < kEntries; ++i) {
    const __m256 above = _mm256_cmp_ps(_mm256_broadcast_ss(table + i), v, _CMP_LT_OQ);
    rank = _mm256_sub_epi32(rank, _mm256_castps_si256(above));
  }
  return rank;
}

inline void store_codes(uint8_t* p, __m256i codes) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

inline void nf4_codes(Floats v, uint8_t* codes) {
  static constexpr Nf4Boundaries boundaries = nf4_boundaries();
  store_codes(codes, rank_in<15>(boundaries.value, v));
}

inline void fp4_codes(Floats v, uint8_t* codes) {
  static constexpr Fp4Pivots pivots = fp4_pivots();
  static constexpr Fp4CodeOfRank code_of_rank = fp4_code_of_rank();
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
  const __m256i map = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code_of_rank.code));
  const __m256i code = _mm256_permutevar8x32_epi32(map, rank_in<7>(pivots.value, magnitude));
  const __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ));
  store_codes(codes, _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8))));
}

template <typename T>
class Decoder;

template <>
class Decoder<float> {
 public:
  static constexpr int kBytes = 4;
  Decoder(const float* levels, float scale)
      : low_(_mm256_mul_ps(load(levels), _mm256_set1_ps(scale))),
        high_(_mm256_mul_ps(load(levels + 8), _mm256_set1_ps(scale))) {}
  void step(const uint8_t* bytes, float* out) const {
    int32_t word = 0;
    std::memcpy(&word, bytes, sizeof word);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
    // Bits 0-2 choose within a half, bit 3, moved to the sign, between the halves.
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    _mm256_storeu_ps(
        out, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, index), _mm256_permutevar8x32_ps(high_, index), half));
  }

 private:
  __m256 low_;
  __m256 high_;
};

// pshufb looks up bytes, so a table of 16-bit values is held as a plane of low bytes and one of high bytes.
template <typename T>
class Decoder {
 public:
  static constexpr int kBytes = 16;
  Decoder(const float* levels, float scale) {
    alignas(32) T table[16];
    for (int i = 0; i < 16; ++i) {
      table[i] = from_float<T>(levels[i] * scale);
    }
    const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    const __m128i second = _mm_load_si128(reinterpret_cast<const __m128i*>(table + 8));
    const __m128i byte = _mm_set1_epi16(0xff);
    low_ = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
    high_ = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  }
  void step(const uint8_t* bytes, T* out) const {
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(raw, 4), nibble);
    const __m128i odd = _mm_and_si128(raw, nibble);
    const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i low = _mm256_shuffle_epi8(low_, index);
    const __m256i high = _mm256_shuffle_epi8(high_, index);
    const __m256i first = _mm256_unpacklo_epi8(low, high);
    const __m256i second = _mm256_unpackhi_epi8(low, high);
    auto* target = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(target, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256(target + 1, _mm256_permute2x128_si256(first, second, 0x31));
  }

 private:
  __m256i low_;
  __m256i high_;
};

#elif !defined(QLORA_NATIVE_NEON)  // one lane: the rule itself

struct Floats {
  float value;
};
inline constexpr int kLanes = 1;

template <typename T>
inline Floats load(const T* p) {
  return {to_float(*p)};
}
inline void store(float* p, Floats v) { *p = v.value; }
inline Floats zero() { return {0.0f}; }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return {a.value * b.value + sum.value}; }
inline float total(Floats v) { return v.value; }

struct MagnitudeMax {
  uint32_t bits = 0;
  void update(Floats v) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(v.value) & 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  uint32_t reduce() const { return bits; }
};

inline Floats normalise(Floats v, const Normaliser& by) { return {by(v.value)}; }
inline void nf4_codes(Floats v, uint8_t* codes) { *codes = nf4_code(v.value); }
inline void fp4_codes(Floats v, uint8_t* codes) { *codes = fp4_code(v.value); }

template <typename T>
class Decoder {
 public:
  static constexpr int kBytes = 1;
  Decoder(const float* levels, float scale) {
    for (int i = 0; i < 16; ++i) {
      table_[i] = from_float<T>(levels[i] * scale);
    }
  }
  void step(const uint8_t* bytes, T* out) const {
    out[0] = table_[*bytes >> 4];
    out[1] = table_[*bytes & 15];
  }

 private:
  T table_[16];
};

#endif

// One step of an inner product of kStep elements, summed in fp32.
template <typename T>
struct Dot {
  static constexpr int kStep = kLanes;
  static Floats load_operand(const T* p) { return load(p); }
  static Floats step(Floats a, Floats b, Floats sum) { return multiply_add(a, b, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<Bf16> {
  static constexpr int kStep = 32;
  static __m512bh load_operand(const Bf16* p) { return std::bit_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Floats step(__m512bh a, __m512bh b, Floats sum) { return _mm512_dpbf16_ps(sum, a, b); }
};
#elif defined(QLORA_NATIVE_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Dot<Bf16> {
  static constexpr int kStep = 8;
  static bfloat16x8_t load_operand(const Bf16* p) {
    return vreinterpretq_bf16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  }
  static Floats step(bfloat16x8_t a, bfloat16x8_t b, Floats sum) { return vbfdotq_f32(sum, a, b); }
};
#endif

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
