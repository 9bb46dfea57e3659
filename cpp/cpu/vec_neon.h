// The operations of vec.h and vec_panel.h on arm64's Advanced SIMD, with BF16 dot products where FEAT_BF16 is compiled
// for. Its table look-ups take bytes, so a table of wider values is held as planes: all first bytes, all second bytes.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "core/arithmetic.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

using Floats = float32x4_t;
inline constexpr int kLanes = 4;

inline Floats load(const float* p) { return vld1q_f32(p); }
inline Floats load(const Bf16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
inline Floats load(const Fp16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
inline void store(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats zero() { return vdupq_n_f32(0.0f); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return vfmaq_f32(sum, a, b); }
inline float total(Floats v) { return vaddvq_f32(v); }

inline Floats normalise(Floats v, const Normaliser& by) {
  const Floats factor = vdupq_n_f32(by.factor);
  return by.divides ? vdivq_f32(v, factor) : vmulq_f32(v, factor);
}

// 16 codes in their order, from 8 bytes.
inline uint8x16_t spread_nibbles(const uint8_t* bytes) {
  const uint8x8_t raw = vld1_u8(bytes);
  const uint8x8_t even = vshr_n_u8(raw, 4);
  const uint8x8_t odd = vand_u8(raw, vdup_n_u8(15));
  return vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd));
}

template <typename T>
class Decoder {
 public:
  static constexpr int kBytes = 8;
  Decoder(const float* levels, float scale) {
    alignas(16) T table[16];
    for (int i = 0; i < 16; ++i) {
      table[i] = from_float<T>(levels[i] * scale);
    }
    planes_ = vld2q_u8(reinterpret_cast<const uint8_t*>(table));
  }
  template <bool kStream = false>
  void step(const uint8_t* bytes, T* out) const {
    const uint8x16_t codes = spread_nibbles(bytes);
    vst2q_u8(reinterpret_cast<uint8_t*>(out),
             (uint8x16x2_t{{vqtbl1q_u8(planes_.val[0], codes), vqtbl1q_u8(planes_.val[1], codes)}}));
  }

 private:
  uint8x16x2_t planes_;
};

template <>
class Decoder<float> {
 public:
  static constexpr int kBytes = 8;
  Decoder(const float* levels, float scale) {
    alignas(16) float table[16];
    for (int i = 0; i < 16; i += kLanes) {
      store(table + i, vmulq_n_f32(load(levels + i), scale));
    }
    planes_ = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
  }
  template <bool kStream = false>
  void step(const uint8_t* bytes, float* out) const {
    const uint8x16_t codes = spread_nibbles(bytes);
    vst4q_u8(reinterpret_cast<uint8_t*>(out),
             (uint8x16x4_t{{vqtbl1q_u8(planes_.val[0], codes), vqtbl1q_u8(planes_.val[1], codes),
                            vqtbl1q_u8(planes_.val[2], codes), vqtbl1q_u8(planes_.val[3], codes)}}));
  }

 private:
  uint8x16x4_t planes_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Panels: see vec_panel.h

using Words = uint32x4_t;
inline constexpr int kMicroRows = 6;  // 6 x 4 sums, 4 registers of the panel, 1 of x, of 32
inline constexpr int kTileVectors = 4;

inline Floats broadcast(const float* p) { return vld1q_dup_f32(p); }
template <unsigned kBits>
inline Words shift_right(Words v) {
  if constexpr (kBits == 0) {
    return v;
  } else {
    return vshrq_n_u32(v, static_cast<int>(kBits));
  }
}

inline Words bf16_bits(Floats v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
}
template <typename T>
Floats round_through(Floats v);
template <>
inline Floats round_through<float>(Floats v) {
  return v;
}
template <>
inline Floats round_through<Bf16>(Floats v) {
  return vreinterpretq_f32_u32(vandq_u32(bf16_bits(v), vdupq_n_u32(0xffff0000u)));
}
template <>
inline Floats round_through<Fp16>(Floats v) {
  return vcvt_f32_f16(vcvt_f16_f32(v));
}
inline Floats pair_up(Floats even, Floats odd) {
  return vreinterpretq_f32_u32(vsriq_n_u32(vreinterpretq_u32_f32(odd), vreinterpretq_u32_f32(even), 16));
}

struct LevelTable {
  float32x4x4_t level;
  explicit LevelTable(const float* levels)
      : level{{load(levels), load(levels + 4), load(levels + 8), load(levels + 12)}} {}
  template <typename T>
  LevelTable scaled(float scale) const {
    LevelTable result = *this;
    for (Floats& four : result.level.val) {
      four = round_through<T>(vmulq_n_f32(four, scale));
    }
    return result;
  }
  Floats at(Words codes) const {
    const uint8x16x4_t bytes{{vreinterpretq_u8_f32(level.val[0]), vreinterpretq_u8_f32(level.val[1]),
                              vreinterpretq_u8_f32(level.val[2]), vreinterpretq_u8_f32(level.val[3])}};
    const uint32x4_t index = vmlaq_n_u32(vdupq_n_u32(0x03020100u), vandq_u32(codes, vdupq_n_u32(15)), 0x04040404u);
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(index)));
  }
};

inline Words natural_codes(const uint8_t* packed, int64_t element) {
  uint16_t word = 0;
  std::memcpy(&word, packed + element / 2, sizeof word);
  static constexpr int32_t kShift[kLanes] = {-4, 0, -12, -8};
  return vshlq_u32(vdupq_n_u32(word), vld1q_s32(kShift));
}

inline void transpose_codes(const uint8_t* const* rows, int64_t offset, Words* out) {
  const auto row = [&](int i) { return vreinterpretq_u32_u8(vld1q_u8(rows[i] + offset)); };
  const uint32x4_t ab_even = vtrn1q_u32(row(0), row(1));
  const uint32x4_t ab_odd = vtrn2q_u32(row(0), row(1));
  const uint32x4_t cd_even = vtrn1q_u32(row(2), row(3));
  const uint32x4_t cd_odd = vtrn2q_u32(row(2), row(3));
  const auto low = [](uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u32_u64(vtrn1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
  };
  const auto high = [](uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u32_u64(vtrn2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
  };
  out[0] = low(ab_even, cd_even);
  out[1] = low(ab_odd, cd_odd);
  out[2] = high(ab_even, cd_even);
  out[3] = high(ab_odd, cd_odd);
}

// v[i] lane j becomes v[j] lane i.
inline void transpose(Floats (&v)[kLanes]) {
  const float32x4_t a = vtrn1q_f32(v[0], v[1]);
  const float32x4_t b = vtrn2q_f32(v[0], v[1]);
  const float32x4_t c = vtrn1q_f32(v[2], v[3]);
  const float32x4_t d = vtrn2q_f32(v[2], v[3]);
  v[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
  v[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
  v[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
  v[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

inline void store_as(float* p, Floats v) { store(p, v); }
inline void store_as(Bf16* p, Floats v) {
  const uint32x4_t quieted = vorrq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x400000));
  const uint32x4_t words = vbslq_u32(vceqq_f32(v, v), bf16_bits(v), quieted);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(words, 16));
}
inline void store_as(Fp16* p, Floats v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
