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
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Floats v) { return _mm512_reduce_add_ps(v); }

inline Floats normalise(Floats v, const Normaliser& by) {
  const Floats factor = _mm512_set1_ps(by.factor);
  return by.divides ? _mm512_div_ps(v, factor) : _mm512_mul_ps(v, factor);
}

// The streaming store goes past the caches and needs an aligned target.
template <bool kStream>
inline void store_vector(void* p, __m512i v) {
  if constexpr (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(p), v);
  } else {
    _mm512_storeu_si512(p, v);
  }
}

// The 16 levels of one block, scaled and rounded to T once: decoding is then a table look-up, exact by construction.
template <typename T>
class Decoder;

template <>
class Decoder<float> {
 public:
  static constexpr int kBytes = 8;  // packed bytes a step
  Decoder(const float* levels, float scale) : table_(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale))) {}
  template <bool kStream = false>
  void step(const uint8_t* bytes, float* out) const {
    int64_t pairs = 0;
    std::memcpy(&pairs, bytes, sizeof pairs);
    // Each byte comes to stand in the two 32-bit lanes of its elements; permutexvar looks at four bits of each.
    const __m512i spread = _mm512_set_epi32(0x07070707, 0x07070707, 0x06060606, 0x06060606, 0x05050505, 0x05050505,
                                            0x04040404, 0x04040404, 0x03030303, 0x03030303, 0x02020202, 0x02020202,
                                            0x01010101, 0x01010101, 0x00000000, 0x00000000);
    const __m512i words = _mm512_shuffle_epi8(_mm512_set1_epi64(pairs), spread);
    const __m512i index = _mm512_srlv_epi32(words, _mm512_set1_epi64(4));
    store_vector<kStream>(out, _mm512_castps_si512(_mm512_permutexvar_ps(index, table_)));
  }

 private:
  __m512 table_;
};

// Each rounded value in both halves of its lane.
inline __m512i bf16_twice(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(high, 16), high);
}

inline __m256i round_to_bf16(__m512 v) { return _mm512_cvtepi32_epi16(bf16_twice(v)); }

inline __m512i fp16_twice(__m512 v) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return _mm512_or_si512(_mm512_slli_epi32(low, 16), low);
}

class Decoder16 {
 public:
  static constexpr int kBytes = 16;
  explicit Decoder16(__m512i twice) : table_(twice) {}
  template <bool kStream = false>
  void step(const uint8_t* bytes, void* out) const {
    // Each byte comes to stand in the high bytes of the two words of its elements. vpermw looks at five bits of a word:
    // the nibble belongs in the upper four, the lowest is free because every entry stands in the table twice.
    const __m512i spread =
        _mm512_set_epi64(0x0f0f0f0f0e0e0e0e, 0x0d0d0d0d0c0c0c0c, 0x0b0b0b0b0a0a0a0a, 0x0909090908080808,
                         0x0707070706060606, 0x0505050504040404, 0x0303030302020202, 0x0101010100000000);
    const __m512i line = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(line, spread), _mm512_set1_epi32(7 << 16 | 11));
    store_vector<kStream>(out, _mm512_permutexvar_epi16(index, table_));
  }

 private:
  __m512i table_;
};

template <>
class Decoder<Bf16> : public Decoder16 {
 public:
  Decoder(const float* levels, float scale)
      : Decoder16(bf16_twice(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale)))) {}
};

template <>
class Decoder<Fp16> : public Decoder16 {
 public:
  Decoder(const float* levels, float scale)
      : Decoder16(fp16_twice(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale)))) {}
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
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Floats v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline Floats normalise(Floats v, const Normaliser& by) {
  const Floats factor = _mm256_set1_ps(by.factor);
  return by.divides ? _mm256_div_ps(v, factor) : _mm256_mul_ps(v, factor);
}

template <bool kStream>
inline void store_vector(void* p, __m256i v) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(p), v);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
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
  template <bool kStream = false>
  void step(const uint8_t* bytes, float* out) const {
    int32_t word = 0;
    std::memcpy(&word, bytes, sizeof word);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
    // Bits 0-2 choose within a half, bit 3, moved to the sign, between the halves.
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    const __m256 low = _mm256_permutevar8x32_ps(low_, index);
    const __m256 high = _mm256_permutevar8x32_ps(high_, index);
    store_vector<kStream>(out, _mm256_castps_si256(_mm256_blendv_ps(low, high, half)));
  }

 private:
  __m256 low_;
  __m256 high_;
};

// 16 values rounded to T, in order.
template <typename T>
__m256i rounded(__m256 low, __m256 high);

inline __m256i bf16_words(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quieted = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quieted, nan), 16);
}

template <>
inline __m256i rounded<Bf16>(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_words(low), bf16_words(high)), 0xd8);
}

template <>
inline __m256i rounded<Fp16>(__m256 low, __m256 high) {
  return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}

// pshufb looks up bytes, so a table of 16-bit values is held as a plane of low bytes and one of high bytes, each in
// both 128-bit lanes.
template <typename T>
class Decoder {
 public:
  static constexpr int kBytes = 16;
  Decoder(const float* levels, float scale) {
    const __m256 by = _mm256_set1_ps(scale);
    const __m256i table = rounded<T>(_mm256_mul_ps(load(levels), by), _mm256_mul_ps(load(levels + 8), by));
    const __m256i low = _mm256_and_si256(table, _mm256_set1_epi16(0xff));
    const __m256i planes = _mm256_packus_epi16(low, _mm256_srli_epi16(table, 8));
    low_ = _mm256_permute4x64_epi64(planes, 0x88);
    high_ = _mm256_permute4x64_epi64(planes, 0xdd);
  }
  template <bool kStream = false>
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
    store_vector<kStream>(out, _mm256_permute2x128_si256(first, second, 0x20));
    store_vector<kStream>(out + 16, _mm256_permute2x128_si256(first, second, 0x31));
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
inline Floats add(Floats a, Floats b) { return {a.value + b.value}; }
inline Floats multiply(Floats a, Floats b) { return {a.value * b.value}; }
inline Floats divide(Floats a, Floats b) { return {a.value / b.value}; }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return {a.value * b.value + sum.value}; }
inline float total(Floats v) { return v.value; }

template <typename T>
class Decoder {
 public:
  static constexpr int kBytes = 1;
  Decoder(const float* levels, float scale) {
    for (int i = 0; i < 16; ++i) {
      table_[i] = from_float<T>(levels[i] * scale);
    }
  }
  template <bool kStream = false>
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
