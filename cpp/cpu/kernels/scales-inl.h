// Scales: double quantization of groups of 256, and its inverse.
//
// Included by kernels/all-inl.h; the same rules hold.
#pragma once

#include "core/layout.h"
#include "cpu/isa/vec.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/quantize-inl.h"

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

inline Floats scales_of(Floats levels, float nested_absmax, float offset) {
  return add(multiply(levels, all(nested_absmax)), all(offset));
}

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
    const Normalizer by = normalizer_of(highest);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      nested_codes(scales + i, job.offset, by, codes + i);
    }
    for (; i < count; ++i) {
      codes[i] = nearest_nested_code(by(scales[i] - job.offset));
    }
  }
}

// Scales of blocks [first, last) of a weight whose scales are double-quantized.
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
