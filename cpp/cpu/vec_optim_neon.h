// The operations of vec_optim.h on arm64's Advanced SIMD.
#pragma once

#include "core/state_code.h"
#include "cpu/vec_neon.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

struct MagnitudeMax {
  uint32x4_t bits = vdupq_n_u32(0);
  void update(Floats v) { bits = vmaxq_u32(bits, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffffu))); }
  uint32_t reduce() const { return vmaxvq_u32(bits); }
};

inline Floats all(float x) { return vdupq_n_f32(x); }
inline Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats square_root(Floats a) { return vsqrtq_f32(a); }

inline uint32x4_t sign_of(Floats x) { return vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x80000000u)); }
inline Floats with_sign(Floats magnitude, uint32x4_t sign) {
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(magnitude), sign));
}

inline Floats signed_rate(Floats lr, Floats x) {
  const uint32x4_t moves = vorrq_u32(vcltzq_f32(x), vcgtzq_f32(x));
  return vreinterpretq_f32_u32(vandq_u32(moves, vorrq_u32(vreinterpretq_u32_f32(lr), sign_of(x))));
}

template <typename T>
inline void store_rounded(T* p, Floats v) {
  store_as(p, v);
}

// Where the four bytes of 32-bit entry i of a table lie, in each lane.
inline uint8x16_t bytes_of_entry(uint32x4_t i) {
  return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), i, 0x04040404u));
}

class StateDecoder {
 public:
  explicit StateDecoder(const StateCode& code) : a_(table(code.a)), b_(table(code.b)) {}

  Floats operator()(const int8_t* codes) const {
    return decode(vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(load4(codes)))))));
  }
  Floats operator()(const uint8_t* codes) const {
    return decode(vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(load4(codes)))))));
  }

 private:
  static uint8x16x2_t table(const float* entries) {
    return {{vreinterpretq_u8_f32(vld1q_f32(entries)), vreinterpretq_u8_f32(vld1q_f32(entries + 4))}};
  }
  static uint32x2_t load4(const void* p) {
    uint32_t four = 0;
    std::memcpy(&four, p, sizeof four);
    return vdup_n_u32(four);
  }
  Floats decode(Floats value) const {
    const uint32x4_t segment = vandq_u32(vshrq_n_u32(vreinterpretq_u32_f32(value), 23), vdupq_n_u32(7));
    const uint8x16_t bytes = bytes_of_entry(segment);
    const Floats a = with_sign(vreinterpretq_f32_u8(vqtbl2q_u8(a_, bytes)), sign_of(value));
    return vaddq_f32(vmulq_f32(vreinterpretq_f32_u8(vqtbl2q_u8(b_, bytes)), value), a);
  }
  uint8x16x2_t a_;
  uint8x16x2_t b_;
};

using Ints = int32x4_t;

template <typename Code>
inline void store_bytes(Code* p, Ints a, Ints b, Ints c, Ints d) {
  const int16x8_t ab = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b));
  const int16x8_t cd = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
  if constexpr (Code(-1) < Code(0)) {
    vst1q_s8(p, vcombine_s8(vqmovn_s16(ab), vqmovn_s16(cd)));
  } else {
    vst1q_u8(p, vcombine_u8(vqmovun_s16(ab), vqmovun_s16(cd)));
  }
}

class StateEncoder {
 public:
  explicit StateEncoder(const StateCode& code)
      : alpha_(code.alpha), beta_(code.beta), lowest_(vdupq_n_f32(code.lowest)) {}

  Ints of_signed(Floats x) const { return vcvtnq_s32_f32(with_sign(position(vabsq_f32(x)), sign_of(x))); }
  Ints of_unsigned(Floats x) const { return vcvtnq_s32_f32(position(x)); }

 private:
  // 32 floats. A byte index outside of a table of 64 bytes gives zero, or leaves what is there.
  struct Table {
    uint8x16x4_t low;
    uint8x16x4_t high;
    explicit Table(const float* entries) : low(half(entries)), high(half(entries + 16)) {}
    static uint8x16x4_t half(const float* p) {
      return {{vreinterpretq_u8_f32(vld1q_f32(p)), vreinterpretq_u8_f32(vld1q_f32(p + 4)),
               vreinterpretq_u8_f32(vld1q_f32(p + 8)), vreinterpretq_u8_f32(vld1q_f32(p + 12))}};
    }
    Floats at(uint8x16_t bytes) const {
      return vreinterpretq_f32_u8(vqtbx4q_u8(vqtbl4q_u8(low, bytes), high, vsubq_u8(bytes, vdupq_n_u8(64))));
    }
  };
  Floats position(Floats x) const {
    const Floats clamped = vmaxq_f32(x, lowest_);
    const uint32x4_t exponent = vandq_u32(vshrq_n_u32(vreinterpretq_u32_f32(clamped), 23), vdupq_n_u32(31));
    const uint8x16_t bytes = bytes_of_entry(exponent);
    return vaddq_f32(vmulq_f32(clamped, beta_.at(bytes)), alpha_.at(bytes));
  }
  Table alpha_;
  Table beta_;
  Floats lowest_;
};

class SquareSums {
 public:
  void update(const float* x) {
    for (int i = 0; i < 16; ++i) {
      const float64x2_t v = vcvt_f64_f32(vld1_f32(x + 2 * i));
      sums_[i] = vfmaq_f64(sums_[i], v, v);
    }
  }
  void store(double* p) const {
    for (int i = 0; i < 16; ++i) {
      vst1q_f64(p + 2 * i, sums_[i]);
    }
  }

 private:
  float64x2_t sums_[16] = {};
};

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
