// Quantizing whole blocks with AVX-512 F, BW, DQ and VL.
//
// The even elements of 32 stand in one vector and the odd ones in another, so that a pair's codes meet in one 32-bit
// lane and become their byte there; four such vectors are narrowed together to one line of 64 packed bytes.
#pragma once

#include "cpu/isa/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Magnitudes of IEEE floats are ordered like their bits, and anything non-finite lies above all finite values.
inline float largest_magnitude(const float* x, int64_t count) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i highest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    highest = _mm512_max_epu32(highest, _mm512_and_si512(_mm512_loadu_si512(x + i), mask));
  }
  const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(highest), _mm512_extracti64x4_epi64(highest, 1));
  __m128i quarter = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_max_epu32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
  quarter = _mm_max_epu32(quarter, _mm_shuffle_epi32(quarter, 0xb1));
  return std::bit_cast<float>(_mm_cvtsi128_si32(quarter));
}

template <typename T>
inline T largest_magnitude(const T* x, int64_t count) {  // Bf16, Fp16
  const __m512i mask = _mm512_set1_epi16(0x7fff);
  __m512i highest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32) {
    highest = _mm512_max_epu16(highest, _mm512_and_si512(_mm512_loadu_si512(x + i), mask));
  }
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(highest), _mm512_extracti64x4_epi64(highest, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // The largest of eight words is the complement of the smallest complement, and for that there is one instruction.
  const __m128i ones = _mm_set1_epi32(-1);
  const int smallest = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)));
  return T{static_cast<uint16_t>(~smallest & 0xffff)};
}

// Elements 0, 2, .. 30 and 1, 3, .. 31 of 32.
struct Pairs {
  __m512 even;
  __m512 odd;
};

inline Pairs pairs_of(__m512 low, __m512 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

inline Pairs load_pairs(const float* p) { return pairs_of(load(p), load(p + 16)); }
inline Pairs load_pairs(const Fp16* p) { return pairs_of(load(p), load(p + 16)); }
inline Pairs load_pairs(const Bf16* p) {  // a lane already holds a pair, and the high half of a float is a bfloat16
  const __m512i words = _mm512_loadu_si512(p);
  const __m512i high = _mm512_set1_epi32(-65536);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), _mm512_castsi512_ps(_mm512_and_si512(words, high))};
}

inline __m512i cells_of(__m512 v) {
  const __m512 scaled = _mm512_fmadd_ps(v, _mm512_set1_ps(kCellsPerUnit), _mm512_set1_ps(kCellMagic));
  return _mm512_castps_si512(scaled);
}

template <QuantType kType>
class Encoder;

template <>
class Encoder<QuantType::kNf4> {
 public:
  // One packed byte in each 32-bit lane.
  __m512i operator()(const Pairs& x, __m512 factor) const {
    const __m512i high = code(_mm512_mul_ps(x.even, factor), shifted_, 16);
    const __m512i low = code(_mm512_mul_ps(x.odd, factor), lower_, 1);
    return _mm512_or_si512(high, low);
  }

 private:
  static constexpr CodeCells<32> kCells = nf4_cells();

  __m512i code(__m512 v, const __m512i* lower_codes, int one) const {
    const __m512i cell = cells_of(v);
    const __m512 decision = _mm512_permutex2var_ps(decision_[0], cell, decision_[1]);
    const __m512i lower = _mm512_permutex2var_epi32(lower_codes[0], cell, lower_codes[1]);
    const __mmask16 above = _mm512_cmp_ps_mask(decision, v, _CMP_LT_OQ);
    return _mm512_mask_add_epi32(lower, above, lower, _mm512_set1_epi32(one));
  }

  __m512 decision_[2] = {_mm512_loadu_ps(kCells.decision), _mm512_loadu_ps(kCells.decision + 16)};
  __m512i lower_[2] = {_mm512_loadu_si512(kCells.lower), _mm512_loadu_si512(kCells.lower + 16)};
  __m512i shifted_[2] = {_mm512_slli_epi32(lower_[0], 4), _mm512_slli_epi32(lower_[1], 4)};
};

template <>
class Encoder<QuantType::kFp4> {
 public:
  __m512i operator()(const Pairs& x, __m512 factor) const {
    const __m512i high = code(_mm512_mul_ps(x.even, factor), shifted_, 0x80);
    const __m512i low = code(_mm512_mul_ps(x.odd, factor), code_, 8);
    return _mm512_or_si512(high, low);
  }

 private:
  static constexpr Fp4CodeCells kCells = fp4_code_cells();

  // codes[0] holds the codes below the cells' pivots, codes[1] those above.
  __m512i code(__m512 v, const __m512i* codes, int sign) const {
    const __m512 magnitude = _mm512_abs_ps(v);
    const __m512i cell = cells_of(magnitude);
    const __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(cell, pivot_), magnitude, _CMP_LT_OQ);
    const __m512i below = _mm512_permutexvar_epi32(cell, codes[0]);
    const __m512i code = _mm512_mask_permutexvar_epi32(below, above, cell, codes[1]);
    const __mmask16 negative = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(sign));
  }

  __m512 pivot_ = _mm512_loadu_ps(kCells.pivot);
  __m512i code_[2] = {_mm512_loadu_si512(kCells.below), _mm512_loadu_si512(kCells.above)};
  __m512i shifted_[2] = {_mm512_slli_epi32(code_[0], 4), _mm512_slli_epi32(code_[1], 4)};
};

// Codes of `count` elements, a multiple of 32; factor[b] normalizes the b-th 2^log2_block of them. Ordinary stores:
// past the caches, a quarter as many bytes as are read took longer (1.3x, on a Xeon with AMX).
template <typename T, QuantType kType>
void encode(const T* x, int64_t count, const float* factor, int log2_block, uint8_t* packed) {
  constexpr int64_t kPerLine = 64 / sizeof(T);
  const Encoder<kType> encoder;
  const auto bytes_at = [&](int64_t i) { return encoder(load_pairs(x + i), _mm512_set1_ps(factor[i >> log2_block])); };
  // Narrowing works within the four 128-bit lanes and leaves a 4 x 4 matrix of 32-bit words transposed.
  const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 128 <= count; i += 128) {
    for (int64_t next = 0; next < 128; next += kPerLine) {
      _mm_prefetch(reinterpret_cast<const char*>(x + kElementsPerChunk + i + next), _MM_HINT_T0);
    }
    const __m512i first = _mm512_packus_epi32(bytes_at(i), bytes_at(i + 32));
    const __m512i second = _mm512_packus_epi32(bytes_at(i + 64), bytes_at(i + 96));
    const __m512i line = _mm512_permutexvar_epi32(transposed, _mm512_packus_epi16(first, second));
    _mm512_storeu_si512(packed + i / 2, line);
  }
  for (; i < count; i += 32) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi32_epi8(bytes_at(i)));
  }
}

template <QuantType kType>
class Nearest {
 public:
  __m512i code(Floats v) const {
    if constexpr (kType == QuantType::kNf4) {
      const Floats clamped = _mm512_min_ps(_mm512_max_ps(v, all(-1.0f)), all(1.0f));
      const __m512i cell = cells_of(clamped);
      const __m512i lower = _mm512_permutex2var_epi32(lower_[0], cell, lower_[1]);
      const Floats decision = _mm512_permutex2var_ps(decision_[0], cell, decision_[1]);
      const __mmask16 above = _mm512_cmp_ps_mask(decision, clamped, _CMP_LT_OQ);
      return _mm512_mask_add_epi32(lower, above, lower, _mm512_set1_epi32(1));
    } else {
      const Floats magnitude = _mm512_min_ps(_mm512_abs_ps(v), all(1.0f));
      const __m512i cell = cells_of(magnitude);
      const __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(cell, decision_[0]), magnitude, _CMP_LT_OQ);
      const __m512i below = _mm512_permutexvar_epi32(cell, lower_[0]);
      const __m512i code = _mm512_mask_permutexvar_epi32(below, above, cell, lower_[1]);
      const __mmask16 negative = _mm512_cmp_ps_mask(v, zero(), _CMP_LT_OQ);
      return _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
    }
  }
  void levels(const Floats* v, Floats* out) const { out[0] = _mm512_permutexvar_ps(code(v[0]), levels_); }
  void codes(const Floats* v, uint8_t* out) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(code(v[0])));
  }

 private:
  static constexpr CodeCells<32> kCells = nf4_cells();
  static constexpr Fp4CodeCells kFp4 = fp4_code_cells();
  static constexpr Levels kLevels = levels_of(kType);
  static constexpr bool kIsNf4 = kType == QuantType::kNf4;

  Floats levels_ = load(kLevels.value);
  Floats decision_[2] = {load(kIsNf4 ? kCells.decision : kFp4.pivot), load(kCells.decision + 16)};
  __m512i lower_[2] = {_mm512_loadu_si512(kIsNf4 ? kCells.lower : kFp4.below),
                       _mm512_loadu_si512(kIsNf4 ? kCells.lower + 16 : kFp4.above)};
};

// Codes of kLanes scales: nearest_nested_code() of the normalized difference from the offset.
inline void nested_codes(const float* scales, float offset, const Normalizer& by, uint8_t* codes) {
  const __m512i v = _mm512_castps_si512(normalize(_mm512_sub_ps(load(scales), _mm512_set1_ps(offset)), by));
  const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff));
  const __m512i raised = _mm512_max_epu32(magnitude, _mm512_set1_epi32(static_cast<int>(NestedCells::kLowest)));
  const __m512i cell =
      _mm512_sub_epi32(_mm512_srli_epi32(raised, NestedCells::kShift), _mm512_set1_epi32(NestedCells::kFirst));
  const __m512i entry = _mm512_i32gather_epi32(cell, kNestedCells.entry, 4);
  const __m512i low = _mm512_set1_epi32(NestedCells::kLowMask);
  const __mmask16 beyond = _mm512_cmpgt_epu32_mask(_mm512_and_si512(raised, low), _mm512_and_si512(entry, low));
  const __m512i base = _mm512_srli_epi32(entry, 24);
  const __m512i positive = _mm512_mask_add_epi32(base, beyond, base, _mm512_set1_epi32(1));
  const __m512i mirrored = _mm512_sub_epi32(_mm512_set1_epi32(2 * kNestedZero), positive);
  const __m512i negative = _mm512_max_epi32(mirrored, _mm512_setzero_si512());
  const __m512i code = _mm512_mask_mov_epi32(positive, _mm512_movepi32_mask(v), negative);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
}

inline Floats nested_levels(const float* table, const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), table, 4);
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
