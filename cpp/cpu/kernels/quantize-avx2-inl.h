// Quantizing whole blocks with AVX2. Even and odd elements are kept apart as in kernels/quantize-avx512-inl.h; the code
// is found by bisection, whose tables of up to eight entries are one permutation each.
#pragma once

#include "cpu/isa/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

inline __m256i load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline float largest_magnitude(const float* x, int64_t count) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i highest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8) {
    highest = _mm256_max_epu32(highest, _mm256_and_si256(load_words(x + i), mask));
  }
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(highest), _mm256_extracti128_si256(highest, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return std::bit_cast<float>(_mm_cvtsi128_si32(half));
}

template <typename T>
inline T largest_magnitude(const T* x, int64_t count) {  // Bf16, Fp16
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  __m256i highest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 16) {
    highest = _mm256_max_epu16(highest, _mm256_and_si256(load_words(x + i), mask));
  }
  const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(highest), _mm256_extracti128_si256(highest, 1));
  // The largest of eight words is the complement of the smallest complement, and for that there is one instruction.
  const __m128i ones = _mm_set1_epi32(-1);
  const int smallest = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, ones)));
  return T{static_cast<uint16_t>(~smallest & 0xffff)};
}

// Elements 0, 2, .. 14 and 1, 3, .. 15 of 16.
struct Pairs {
  __m256 even;
  __m256 odd;
};

inline Pairs pairs_of(__m256 low, __m256 high) {
  const auto in_order = [](__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
  return {in_order(_mm256_shuffle_ps(low, high, 0x88)), in_order(_mm256_shuffle_ps(low, high, 0xdd))};
}

inline Pairs load_pairs(const float* p) { return pairs_of(load(p), load(p + 8)); }
inline Pairs load_pairs(const Fp16* p) { return pairs_of(load(p), load(p + 8)); }
inline Pairs load_pairs(const Bf16* p) {
  const __m256i words = load_words(p);
  const __m256i high = _mm256_set1_epi32(-65536);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), _mm256_castsi256_ps(_mm256_and_si256(words, high))};
}

// One level of a bisection: rank r of the level above becomes 2r, or 2r + 1 if the r-th entry lies strictly below v.
inline __m256i refine(__m256i rank, __m256 entries, __m256 v) {
  const __m256 above = _mm256_cmp_ps(_mm256_permutevar8x32_ps(entries, rank), v, _CMP_LT_OQ);
  return _mm256_sub_epi32(_mm256_add_epi32(rank, rank), _mm256_castps_si256(above));
}

template <QuantType kType>
class Encoder;

template <>
class Encoder<QuantType::kNf4> {
 public:
  // The code of each lane.
  __m256i operator()(__m256 v) const {
    const __m256i half = _mm256_castps_si256(_mm256_cmp_ps(_mm256_set1_ps(kBoundaries.value[7]), v, _CMP_LT_OQ));
    __m256i rank = _mm256_srli_epi32(half, 31);
    rank = refine(rank, second_, v);
    rank = refine(rank, third_, v);
    return refine(rank, fourth_, v);
  }

 private:
  static constexpr Nf4Boundaries kBoundaries = nf4_boundaries();
  static constexpr BisectionLevel kSecond = bisection_level(kBoundaries, 3, 8, 2);
  static constexpr BisectionLevel kThird = bisection_level(kBoundaries, 1, 4, 4);
  static constexpr BisectionLevel kFourth = bisection_level(kBoundaries, 0, 2, 8);

  __m256 second_ = load(kSecond.value);
  __m256 third_ = load(kThird.value);
  __m256 fourth_ = load(kFourth.value);
};

template <>
class Encoder<QuantType::kFp4> {
 public:
  __m256i operator()(__m256 v) const {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    const __m256i half = _mm256_castps_si256(_mm256_cmp_ps(_mm256_set1_ps(kPivots.value[3]), magnitude, _CMP_LT_OQ));
    __m256i rank = _mm256_srli_epi32(half, 31);
    rank = refine(rank, second_, magnitude);
    rank = refine(rank, third_, magnitude);
    const __m256i code = _mm256_permutevar8x32_epi32(code_of_rank_, rank);
    const __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ));
    return _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
  }

 private:
  static constexpr Fp4Pivots kPivots = fp4_pivots();
  static constexpr Fp4CodeOfRank kCodeOfRank = fp4_code_of_rank();
  static constexpr BisectionLevel kSecond = bisection_level(kPivots, 1, 4, 2);
  static constexpr BisectionLevel kThird = bisection_level(kPivots, 0, 2, 4);

  __m256 second_ = load(kSecond.value);
  __m256 third_ = load(kThird.value);
  __m256i code_of_rank_ = load_words(kCodeOfRank.code);
};

// As in kernels/quantize-avx512-inl.h.
template <typename T, QuantType kType>
void encode(const T* x, int64_t count, const float* factor, int log2_block, uint8_t* packed) {
  constexpr int64_t kPerLine = 64 / sizeof(T);
  const Encoder<kType> encoder;
  const auto bytes_at = [&](int64_t i) {
    const Pairs pairs = load_pairs(x + i);
    const __m256 by = _mm256_set1_ps(factor[i >> log2_block]);
    const __m256i high = encoder(_mm256_mul_ps(pairs.even, by));
    return _mm256_or_si256(_mm256_slli_epi32(high, 4), encoder(_mm256_mul_ps(pairs.odd, by)));
  };
  // Narrowing works within the two 128-bit lanes.
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int64_t next = 0; next < 64; next += kPerLine) {
      _mm_prefetch(reinterpret_cast<const char*>(x + kElementsPerChunk + i + next), _MM_HINT_T0);
    }
    const __m256i first = _mm256_packus_epi32(bytes_at(i), bytes_at(i + 16));
    const __m256i second = _mm256_packus_epi32(bytes_at(i + 32), bytes_at(i + 48));
    const __m256i line = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), in_order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), line);
  }
  if (i < count) {  // a last block of 32
    const __m256i words = _mm256_packus_epi32(bytes_at(i), bytes_at(i + 16));
    const __m256i line = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), in_order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm256_castsi256_si128(line));
  }
}

template <QuantType kType>
class Nearest {
 public:
  void levels(const Floats* v, Floats* out) const {
    for (int i = 0; i < kParts; ++i) {
      const __m256i code = encoder_(v[i]);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
      const __m256 low = _mm256_permutevar8x32_ps(low_, code);
      out[i] = _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(high_, code), upper);
    }
  }
  void codes(const Floats* v, uint8_t* out) const {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(encoder_(v[0]), encoder_(v[1])), 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
  }

 private:
  static constexpr Levels kLevels = levels_of(kType);

  Encoder<kType> encoder_;
  Floats low_ = load(kLevels.value);
  Floats high_ = load(kLevels.value + 8);
};

// Codes of kLanes scales: nearest_nested_code() of the normalized difference from the offset.
inline void nested_codes(const float* scales, float offset, const Normalizer& by, uint8_t* codes) {
  const __m256i v = _mm256_castps_si256(normalize(_mm256_sub_ps(load(scales), _mm256_set1_ps(offset)), by));
  const __m256i magnitude = _mm256_and_si256(v, _mm256_set1_epi32(0x7fffffff));
  const __m256i raised = _mm256_max_epu32(magnitude, _mm256_set1_epi32(static_cast<int>(NestedCells::kLowest)));
  const __m256i cell =
      _mm256_sub_epi32(_mm256_srli_epi32(raised, NestedCells::kShift), _mm256_set1_epi32(NestedCells::kFirst));
  const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(kNestedCells.entry), cell, 4);
  const __m256i low = _mm256_set1_epi32(NestedCells::kLowMask);
  const __m256i beyond = _mm256_cmpgt_epi32(_mm256_and_si256(raised, low), _mm256_and_si256(entry, low));
  const __m256i positive = _mm256_sub_epi32(_mm256_srli_epi32(entry, 24), beyond);
  const __m256i mirrored = _mm256_sub_epi32(_mm256_set1_epi32(2 * kNestedZero), positive);
  const __m256i negative = _mm256_max_epi32(mirrored, _mm256_setzero_si256());
  const __m256i code = _mm256_blendv_epi8(positive, negative, _mm256_srai_epi32(v, 31));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(words, words));
}

inline Floats nested_levels(const float* table, const uint8_t* codes) {
  // A gather takes longer than its eight loads.
  return _mm256_setr_ps(table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]], table[codes[4]],
                        table[codes[5]], table[codes[6]], table[codes[7]]);
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
