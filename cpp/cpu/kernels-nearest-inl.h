// Nearest levels of 16 values at a time, whatever their range, and sums of 16 lanes in one order for every instruction
// set: what the calibrated methods decide by must not depend on it.
//
// Included by kernels-inl.h; the same rules hold.
#pragma once

#include "cpu/kernels-quantize-inl.h"
#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int kSumLanes = 16;
constexpr int kParts = kSumLanes / kLanes;  // vectors that hold 16 values

#if defined(__AVX512BW__)

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

#elif defined(__AVX2__)

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

#elif defined(QLORA_NATIVE_NEON)

template <QuantType kType>
class Nearest {
 public:
  void levels(const Floats* v, Floats* out) const {
    uint8_t codes_of_v[kSumLanes];
    codes(v, codes_of_v);
    for (int i = 0; i < kParts; ++i) {
      const uint8_t* code = codes_of_v + i * kLanes;
      const float four[kLanes] = {kLevels.value[code[0]], kLevels.value[code[1]], kLevels.value[code[2]],
                                  kLevels.value[code[3]]};
      out[i] = load(four);
    }
  }
  void codes(const Floats* v, uint8_t* out) const { vst1q_u8(out, encoder_(v)); }

 private:
  static constexpr Levels kLevels = levels_of(kType);

  Encoder<kType> encoder_;
};

#else

template <QuantType kType>
class Nearest {
 public:
  void levels(const Floats* v, Floats* out) const {
    for (int i = 0; i < kParts; ++i) {
      out[i] = {kLevels.value[code(v[i])]};
    }
  }
  void codes(const Floats* v, uint8_t* out) const {
    for (int i = 0; i < kParts; ++i) {
      out[i] = code(v[i]);
    }
  }

 private:
  static constexpr Levels kLevels = levels_of(kType);

  static uint8_t code(Floats v) { return kType == QuantType::kNf4 ? nf4_code(v.value) : fp4_code(v.value); }
};

#endif

// Lane i and lane i + 8, then i and i + 4, and so on. Overwrites the sums.
inline float sum_by_halves(Floats* sums) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      sums[i] = add(sums[i], sums[i + half]);
    }
  }
  return total_by_halves(sums[0]);
}

// 1 / scale, and 0 where that is not finite: such a block takes the code of zero throughout.
inline float reciprocal_or_zero(float scale) {
  const float reciprocal = 1.0f / scale;
  return (std::bit_cast<uint32_t>(reciprocal) & kMagnitudeMask) < kInfinityBits ? reciprocal : 0.0f;
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
