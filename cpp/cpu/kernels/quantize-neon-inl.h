// Quantizing whole blocks with arm64's Advanced SIMD. Even and odd elements are kept apart until their codes meet in a
// byte; the code is found by bisection, as with AVX2.
#pragma once

#include "cpu/isa/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

inline float largest_magnitude(const float* x, int64_t count) {
  const uint32x4_t mask = vdupq_n_u32(0x7fffffffu);
  uint32x4_t highest = vdupq_n_u32(0);
  for (int64_t i = 0; i < count; i += 4) {
    highest = vmaxq_u32(highest, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), mask));
  }
  return std::bit_cast<float>(vmaxvq_u32(highest));
}

template <typename T>
inline T largest_magnitude(const T* x, int64_t count) {  // Bf16, Fp16
  const uint16x8_t mask = vdupq_n_u16(0x7fff);
  uint16x8_t highest = vdupq_n_u16(0);
  for (int64_t i = 0; i < count; i += 8) {
    highest = vmaxq_u16(highest, vandq_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(x + i)), mask));
  }
  return T{vmaxvq_u16(highest)};
}

// Elements 0, 2, 4, 6 in val[0] and 1, 3, 5, 7 in val[1].
inline float32x4x2_t load_pairs(const float* p) { return vld2q_f32(p); }
inline float32x4x2_t load_pairs(const Bf16* p) {
  const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  return {{vreinterpretq_f32_u32(vshlq_n_u32(words, 16)),
           vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000u)))}};
}
inline float32x4x2_t load_pairs(const Fp16* p) {
  const uint16x4x2_t words = vld2_u16(reinterpret_cast<const uint16_t*>(p));
  return {{vcvt_f32_f16(vreinterpret_f16_u16(words.val[0])), vcvt_f32_f16(vreinterpret_f16_u16(words.val[1]))}};
}

// Rank r of the level above becomes 2r, or 2r + 1 if the r-th entry lies strictly below v; a true comparison is -1.
inline uint32x4_t refined(uint32x4_t rank, uint8x16_t entry, Floats v) {
  return vsubq_u32(vaddq_u32(rank, rank), vcltq_f32(vreinterpretq_f32_u8(entry), v));
}
inline uint8x16_t bytes_of_rank(uint32x4_t rank) {
  return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), rank, 0x04040404u));
}
inline uint8x16_t as_bytes(Floats v) { return vreinterpretq_u8_f32(v); }

// The low bytes of 16 lanes, in order.
inline uint8x16_t narrowed(const uint32x4_t* lanes) {
  const auto words = [&](int i) {
    return vuzp1q_u16(vreinterpretq_u16_u32(lanes[i]), vreinterpretq_u16_u32(lanes[i + 1]));
  };
  return vuzp1q_u8(vreinterpretq_u8_u16(words(0)), vreinterpretq_u8_u16(words(2)));
}

// Encoder: the codes of 16 values.
template <QuantType kType>
class Encoder;

template <>
class Encoder<QuantType::kNf4> {
 public:
  uint8x16_t operator()(const Floats* v) const {
    uint32x4_t rank[4];
    for (int i = 0; i < 4; ++i) {
      rank[i] = vshrq_n_u32(vcltq_f32(vdupq_n_f32(kBoundaries.value[7]), v[i]), 31);
      rank[i] = refined(rank[i], vqtbl1q_u8(second_, bytes_of_rank(rank[i])), v[i]);
      rank[i] = refined(rank[i], vqtbl1q_u8(third_, bytes_of_rank(rank[i])), v[i]);
      rank[i] = refined(rank[i], vqtbl2q_u8(fourth_, bytes_of_rank(rank[i])), v[i]);
    }
    return narrowed(rank);
  }

 private:
  static constexpr Nf4Boundaries kBoundaries = nf4_boundaries();
  static constexpr BisectionLevel kSecond = bisection_level(kBoundaries, 3, 8, 2);
  static constexpr BisectionLevel kThird = bisection_level(kBoundaries, 1, 4, 4);
  static constexpr BisectionLevel kFourth = bisection_level(kBoundaries, 0, 2, 8);

  uint8x16_t second_ = as_bytes(load(kSecond.value));
  uint8x16_t third_ = as_bytes(load(kThird.value));
  uint8x16x2_t fourth_{{as_bytes(load(kFourth.value)), as_bytes(load(kFourth.value + 4))}};
};

template <>
class Encoder<QuantType::kFp4> {
 public:
  uint8x16_t operator()(const Floats* v) const {
    uint32x4_t rank[4];
    uint32x4_t negative[4];
    for (int i = 0; i < 4; ++i) {
      const Floats magnitude = vabsq_f32(v[i]);
      rank[i] = vshrq_n_u32(vcltq_f32(vdupq_n_f32(kPivots.value[3]), magnitude), 31);
      rank[i] = refined(rank[i], vqtbl1q_u8(second_, bytes_of_rank(rank[i])), magnitude);
      rank[i] = refined(rank[i], vqtbl1q_u8(third_, bytes_of_rank(rank[i])), magnitude);
      negative[i] = vcltzq_f32(v[i]);
    }
    const uint8x16_t sign = vandq_u8(narrowed(negative), vdupq_n_u8(8));
    return vorrq_u8(vqtbl1q_u8(code_of_rank_, narrowed(rank)), sign);
  }

 private:
  static constexpr Fp4Pivots kPivots = fp4_pivots();
  static constexpr BisectionLevel kSecond = bisection_level(kPivots, 1, 4, 2);
  static constexpr BisectionLevel kThird = bisection_level(kPivots, 0, 2, 4);

  static uint8x16_t code_table() {
    static constexpr Fp4CodeOfRank kCodeOfRank = fp4_code_of_rank();
    uint8_t bytes[16] = {};
    for (int i = 0; i < 8; ++i) {
      bytes[i] = static_cast<uint8_t>(kCodeOfRank.code[i]);
    }
    return vld1q_u8(bytes);
  }

  uint8x16_t second_ = as_bytes(load(kSecond.value));
  uint8x16_t third_ = as_bytes(load(kThird.value));
  uint8x16_t code_of_rank_ = code_table();
};

// Codes of `count` elements, a multiple of 32; factor[b] normalizes the b-th 2^log2_block of them.
template <typename T, QuantType kType>
void encode(const T* x, int64_t count, const float* factor, int log2_block, uint8_t* packed) {
  constexpr int64_t kPerLine = 64 / sizeof(T);
  const Encoder<kType> encoder;
  for (int64_t i = 0; i < count; i += 32) {
    for (int64_t next = 0; next < 32; next += kPerLine) {
      prefetch(x + kElementsPerChunk + i + next);
    }
    const float by = factor[i >> log2_block];
    Floats even[4];
    Floats odd[4];
    for (int j = 0; j < 4; ++j) {
      const float32x4x2_t pairs = load_pairs(x + i + 8 * j);
      even[j] = vmulq_n_f32(pairs.val[0], by);
      odd[j] = vmulq_n_f32(pairs.val[1], by);
    }
    vst1q_u8(packed + i / 2, vsliq_n_u8(encoder(odd), encoder(even), 4));
  }
}

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

// Codes of kLanes scales: nearest_nested_code() of the normalized difference from the offset.
// There is no gather: the look-ups go lane by lane.
inline void nested_codes(const float* scales, float offset, const Normalizer& by, uint8_t* codes) {
  const float32x4_t v = normalize(vsubq_f32(load(scales), vdupq_n_f32(offset)), by);
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

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
