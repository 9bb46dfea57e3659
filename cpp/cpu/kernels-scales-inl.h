// Scales: double quantisation of groups of 256, and its inverse.
//
// Included by kernels-inl.h; the same rules hold.
#pragma once

#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// slot[i] += slot[i + kHalf], then the same for half of it, down to one slot.
template <int kHalf>
double sum_halves(double* slot) {
  for (int i = 0; i < kHalf; ++i) {
    slot[i] += slot[i + kHalf];
  }
  if constexpr (kHalf > 1) {
    return sum_halves<kHalf / 2>(slot);
  } else {
    return slot[0];
  }
}

// Halving tree over 256 slots, the missing ones zero: the order a 256-thread GPU block would take too.
void sum_groups(const float* values, int64_t count, int64_t first, int64_t last, double* sums) {
  alignas(64) double slot[kNestedBlock];
  for (int64_t g = first; g < last; ++g) {
    const int64_t begin = g * kNestedBlock;
    const int64_t held = count - begin < kNestedBlock ? count - begin : kNestedBlock;
    for (int64_t i = 0; i < held; ++i) {
      slot[i] = static_cast<double>(values[begin + i]);
    }
    for (int64_t i = held; i < kNestedBlock; ++i) {
      slot[i] = 0.0;
    }
    sums[g] = sum_halves<kNestedBlock / 2>(slot);
  }
}

// Codes of kLanes scales: nearest_nested_code() of the normalised difference from the offset.
#if defined(__AVX512BW__)

inline void nested_codes(const float* scales, float offset, const Normaliser& by, uint8_t* codes) {
  const __m512i v = _mm512_castps_si512(normalise(_mm512_sub_ps(load(scales), _mm512_set1_ps(offset)), by));
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

inline Floats scales_of(Floats levels, float nested_absmax, float offset) {
  return _mm512_add_ps(_mm512_mul_ps(levels, _mm512_set1_ps(nested_absmax)), _mm512_set1_ps(offset));
}

#elif defined(__AVX2__)

inline void nested_codes(const float* scales, float offset, const Normaliser& by, uint8_t* codes) {
  const __m256i v = _mm256_castps_si256(normalise(_mm256_sub_ps(load(scales), _mm256_set1_ps(offset)), by));
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

inline Floats scales_of(Floats levels, float nested_absmax, float offset) {
  return _mm256_add_ps(_mm256_mul_ps(levels, _mm256_set1_ps(nested_absmax)), _mm256_set1_ps(offset));
}

#elif defined(QLORA_NATIVE_NEON)

// There is no gather: the look-ups go lane by lane.
inline void nested_codes(const float* scales, float offset, const Normaliser& by, uint8_t* codes) {
  const float32x4_t v = normalise(vsubq_f32(load(scales), vdupq_n_f32(offset)), by);
  const uint32x4_t magnitude = vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffffu));
  const uint32x4_t raised = vmaxq_u32(magnitude, vdupq_n_u32(NestedCells::kLowest));
  uint32_t cell[kLanes];
  vst1q_u32(cell, vsubq_u32(vshrq_n_u32(raised, NestedCells::kShift), vdupq_n_u32(NestedCells::kFirst)));
  for (uint32_t& lane : cell) {
    lane = kNestedCells.entry[lane];
  }
  const uint32x4_t entry = vld1q_u32(cell);
  const uint32x4_t low = vdupq_n_u32(NestedCells::kLowMask);
  const uint32x4_t beyond = vcgtq_u32(vandq_u32(raised, low), vandq_u32(entry, low));
  const int32x4_t positive = vreinterpretq_s32_u32(vsubq_u32(vshrq_n_u32(entry, 24), beyond));
  const int32x4_t mirrored = vsubq_s32(vdupq_n_s32(2 * kNestedZero), positive);
  const int32x4_t negative = vmaxq_s32(mirrored, vdupq_n_s32(0));
  const uint32x4_t is_negative = vcltzq_s32(vreinterpretq_s32_f32(v));
  uint32_t code[kLanes];
  vst1q_u32(code, vreinterpretq_u32_s32(vbslq_s32(is_negative, negative, positive)));
  for (int lane = 0; lane < kLanes; ++lane) {
    codes[lane] = static_cast<uint8_t>(code[lane]);
  }
}

inline Floats nested_levels(const float* table, const uint8_t* codes) {
  const float levels[kLanes] = {table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
  return load(levels);
}

inline Floats scales_of(Floats levels, float nested_absmax, float offset) {
  return vaddq_f32(vmulq_n_f32(levels, nested_absmax), vdupq_n_f32(offset));
}

#else

inline void nested_codes(const float* scales, float offset, const Normaliser& by, uint8_t* codes) {
  *codes = nearest_nested_code(by(*scales - offset));
}

inline Floats nested_levels(const float* table, const uint8_t* codes) { return {table[*codes]}; }

inline Floats scales_of(Floats levels, float nested_absmax, float offset) {
  return {decode_scale(levels.value, nested_absmax, offset)};
}

#endif

void quantize_scale_groups(const ScaleJob& job, int64_t first, int64_t last) {
  for (int64_t g = first; g < last; ++g) {
    const int64_t begin = g * kNestedBlock;
    const int64_t count = job.blocks - begin < kNestedBlock ? job.blocks - begin : kNestedBlock;
    const float* scales = job.absmax + begin;
    uint8_t* codes = job.codes + begin;
    uint32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t magnitude = std::bit_cast<uint32_t>(scales[i] - job.offset) & 0x7fffffffu;
      bits = magnitude > bits ? magnitude : bits;
    }
    const float highest = std::bit_cast<float>(bits);
    job.nested_absmax[g] = highest;
    if (bits == 0) {
      std::memset(codes, kNestedZero, static_cast<size_t>(count));
      continue;
    }
    const Normaliser by = normaliser_of(highest);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      nested_codes(scales + i, job.offset, by, codes + i);
    }
    for (; i < count; ++i) {
      codes[i] = nearest_nested_code(by(scales[i] - job.offset));
    }
  }
}

// Scales of blocks [first, last) of a weight whose scales are double-quantised.
void decode_scales(const WeightView& weight, int64_t first, int64_t last, float* scales) {
  const float offset = *weight.nested_offset;
  while (first < last) {
    const int64_t group = first / kNestedBlock;
    const int64_t group_end = (group + 1) * kNestedBlock;
    const int64_t end = group_end < last ? group_end : last;
    for (; first + kLanes <= end; first += kLanes, scales += kLanes) {
      const Floats levels = nested_levels(weight.nested_code, weight.absmax_codes + first);
      store(scales, scales_of(levels, weight.nested_absmax[group], offset));
    }
    for (; first < end; ++first) {
      *scales++ = weight.scale(first);
    }
  }
}

// Scales of blocks [first, last), however they are stored.
inline void load_scales(const WeightView& weight, int64_t first, int64_t last, float* scales) {
  if (weight.absmax == nullptr) {
    decode_scales(weight, first, last, scales);
  } else {
    std::memcpy(scales, weight.absmax + first, static_cast<size_t>(last - first) * sizeof(float));
  }
}

#if defined(__AVX512BW__)

// load_scales() without a gather, which costs more than all else in a product of one token: the table of codes is held
// as its upper and lower halves, and each is looked up by permutations of 16-bit words.
class ScaleDecoder {
 public:
  explicit ScaleDecoder(const WeightView& weight) : weight_(weight) {
    for (int i = 0; weight.absmax == nullptr && i < 256; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(weight.nested_code[i]);
      low_[i] = static_cast<uint16_t>(bits);
      high_[i] = static_cast<uint16_t>(bits >> 16);
    }
  }

  // scales[0, last - first)
  void operator()(int64_t first, int64_t last, float* scales) const {
    if (weight_.absmax != nullptr) {
      load_scales(weight_, first, last, scales);
      return;
    }
    const float offset = *weight_.nested_offset;
    while (first < last) {
      const int64_t group_end = (first / kNestedBlock + 1) * kNestedBlock;
      const int64_t end = group_end < last ? group_end : last;
      const float nested_absmax = weight_.nested_absmax[first / kNestedBlock];
      while (first < end) {
        const int64_t count = end - first < 32 ? end - first : 32;
        decode(static_cast<__mmask32>(0xffffffffu >> (32 - count)), first, nested_absmax, offset, scales);
        first += count;
        scales += count;
      }
    }
  }

 private:
  void decode(__mmask32 which, int64_t first, float nested_absmax, float offset, float* scales) const {
    alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    alignas(64) static constexpr uint16_t kSecond[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                                         53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                                         27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(which, weight_.absmax_codes + first));
    const __m512i low = look_up(low_, code);
    const __m512i high = look_up(high_, code);
    const __m512i first_half = _mm512_permutex2var_epi16(low, _mm512_load_si512(kFirst), high);
    const __m512i second_half = _mm512_permutex2var_epi16(low, _mm512_load_si512(kSecond), high);
    _mm512_mask_storeu_ps(scales, static_cast<__mmask16>(which),
                          scales_of(_mm512_castsi512_ps(first_half), nested_absmax, offset));
    if (which >> 16 != 0) {
      _mm512_mask_storeu_ps(scales + 16, static_cast<__mmask16>(which >> 16),
                            scales_of(_mm512_castsi512_ps(second_half), nested_absmax, offset));
    }
  }

  // table[code] of 256 words: six bits of the code choose in each of four pairs of registers, two among the pairs.
  static __m512i look_up(const uint16_t* table, __m512i code) {
    const auto in_pair = [&](int pair) {
      return _mm512_permutex2var_epi16(_mm512_load_si512(table + 64 * pair), code,
                                       _mm512_load_si512(table + 64 * pair + 32));
    };
    const __mmask32 odd = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
    const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(128));
    const __m512i below = _mm512_mask_mov_epi16(in_pair(0), odd, in_pair(1));
    const __m512i above = _mm512_mask_mov_epi16(in_pair(2), odd, in_pair(3));
    return _mm512_mask_mov_epi16(below, upper, above);
  }

  const WeightView& weight_;
  alignas(64) uint16_t low_[256];
  alignas(64) uint16_t high_[256];
};

#else

class ScaleDecoder {
 public:
  explicit ScaleDecoder(const WeightView& weight) : weight_(weight) {}
  void operator()(int64_t first, int64_t last, float* scales) const { load_scales(weight_, first, last, scales); }

 private:
  const WeightView& weight_;
};

#endif

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
