// The operations of vec.h on arm64's Advanced SIMD, with BF16 dot products where FEAT_BF16 is compiled for. Its table
// look-ups take bytes, so a table of wider values is held as planes: all first bytes, all second bytes.
#pragma once

#include <arm_neon.h>

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
// Lanes [kFirst, kFirst + kLanes) of 16 signed bytes.
template <int kFirst>
inline Floats widened(Bytes16 codes) {
  const auto bytes = std::bit_cast<int8x16_t>(codes);
  const int16x8_t words = vmovl_s8(kFirst < 8 ? vget_low_s8(bytes) : vget_high_s8(bytes));
  return vcvtq_f32_s32(vmovl_s16(kFirst % 8 == 0 ? vget_low_s16(words) : vget_high_s16(words)));
}
inline Bytes16 look_up_16(const int8_t* table, Bytes16 codes) {
  return std::bit_cast<Bytes16>(vqtbl1q_s8(vld1q_s8(table), std::bit_cast<uint8x16_t>(codes)));
}
inline void store(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats zero() { return vdupq_n_f32(0.0f); }
inline Floats all(float x) { return vdupq_n_f32(x); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return vfmaq_f32(sum, a, b); }
inline float total(Floats v) { return vaddvq_f32(v); }
inline float total_by_halves(Floats v) { return vpadds_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v))); }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Dot<Bf16> {
  static constexpr int kStep = 8;
  static bfloat16x8_t load_operand(const Bf16* p) {
    return vreinterpretq_bf16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  }
  static Floats step(bfloat16x8_t a, bfloat16x8_t b, Floats sum) { return vbfdotq_f32(sum, a, b); }
};

template <>
struct WordProduct<Bf16> {
  static constexpr int kElements = 2;
  static Floats step(Floats x, Floats w, Floats sum) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(x), vreinterpretq_bf16_f32(w));
  }
};
#endif

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
// Panels

using Words = uint32x4_t;
inline constexpr int kMicroRows = 6;  // 6 x 4 sums, 4 registers of the panel, 1 of x, of 32
inline constexpr int kTileVectors = 4;

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

#define QLORA_NATIVE_BYTE_LOOK_UPS
using Bytes = uint8x16_t;
inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes load_table(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes high_nibbles(Bytes v) { return vshrq_n_u8(v, 4); }
inline Bytes low_nibbles(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
inline Bytes look_up(Bytes table, Bytes codes) { return vqtbl1q_u8(table, codes); }
inline Bytes zip_low(Bytes even, Bytes odd) { return vzip1q_u8(even, odd); }
inline Bytes zip_high(Bytes even, Bytes odd) { return vzip2q_u8(even, odd); }
inline uint32x4_t words_of(Bytes v) { return vreinterpretq_u32_u8(v); }
inline Floats even_floats(Bytes upper) { return vreinterpretq_f32_u32(vshlq_n_u32(words_of(upper), 16)); }
inline Floats odd_floats(Bytes upper) {
  return vreinterpretq_f32_u32(vandq_u32(words_of(upper), vdupq_n_u32(0xffff0000u)));
}
inline Floats first_floats(Bytes upper, Bytes lower) {
  return vreinterpretq_f32_u16(vzip1q_u16(vreinterpretq_u16_u8(lower), vreinterpretq_u16_u8(upper)));
}
inline Floats last_floats(Bytes upper, Bytes lower) {
  return vreinterpretq_f32_u16(vzip2q_u16(vreinterpretq_u16_u8(lower), vreinterpretq_u16_u8(upper)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Sixteen lanes

struct Sixteen {
  float32x4_t v[4];
};
struct SixteenInts {
  int32x4_t v[4];
};

template <typename Out, typename Each>
inline Out four_of(const Each& each) {
  return {{each(0), each(1), each(2), each(3)}};
}

inline Sixteen splat(float x) {
  return four_of<Sixteen>([=](int) { return vdupq_n_f32(x); });
}
inline Sixteen operator+(const Sixteen& a, const Sixteen& b) {
  return four_of<Sixteen>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Sixteen operator-(const Sixteen& a, const Sixteen& b) {
  return four_of<Sixteen>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Sixteen operator*(const Sixteen& a, const Sixteen& b) {
  return four_of<Sixteen>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Sixteen operator/(const Sixteen& a, const Sixteen& b) {
  return four_of<Sixteen>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Sixteen fused(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
  return four_of<Sixteen>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// Compared and selected: the instructions for a maximum would keep a NaN in either operand.
inline float32x4_t larger_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Sixteen larger(const Sixteen& a, const Sixteen& b) {
  return four_of<Sixteen>([&](int i) { return larger_of(a.v[i], b.v[i]); });
}
inline Sixteen smaller(const Sixteen& a, const Sixteen& b) {
  return four_of<Sixteen>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline SixteenInts bits_of(const Sixteen& a) {
  return four_of<SixteenInts>([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
}
inline SixteenInts operator+(const SixteenInts& a, int32_t b) {
  return four_of<SixteenInts>([&](int i) { return vaddq_s32(a.v[i], vdupq_n_s32(b)); });
}
inline SixteenInts operator-(const SixteenInts& a, const SixteenInts& b) {
  return four_of<SixteenInts>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
inline SixteenInts half_of(const SixteenInts& a) {
  return four_of<SixteenInts>([&](int i) { return vshrq_n_s32(a.v[i], 1); });
}
inline Sixteen power_of_two(const SixteenInts& a) {
  const SixteenInts biased = a + 127;
  return four_of<Sixteen>([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(biased.v[i], 23)); });
}

template <typename T>
inline Sixteen load16(const T* p) {
  return four_of<Sixteen>([=](int i) { return load(p + 4 * i); });
}
template <typename T>
inline void store16(T* p, const Sixteen& a) {
  for (int i = 0; i < 4; ++i) {
    store_as(p + 4 * i, a.v[i]);
  }
}

inline float sum16(const Sixteen& a) {
  return total_by_halves(vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3])));
}
inline float max16(const Sixteen& a) {
  const float32x4_t four = larger_of(larger_of(a.v[0], a.v[2]), larger_of(a.v[1], a.v[3]));
  const float32x4_t two = larger_of(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(larger_of(two, vextq_f32(two, two, 1)), 0);
}

inline constexpr int kSixteenRows = 6;
inline constexpr int kSixteenColumns = 1;
inline Sixteen multiply_add(const Sixteen& a, const Sixteen& b, const Sixteen& sum) { return fused(a, b, sum); }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define QLORA_NATIVE_BF16_PAIRS
inline Sixteen add_products(const Bf16* a, const Bf16* b, Sixteen sums) {
  uint32_t pair = 0;
  std::memcpy(&pair, a, sizeof pair);
  for (int i = 0; i < 4; ++i) {
    sums.v[i] = vbfdotq_f32(sums.v[i], vreinterpretq_bf16_u32(vdupq_n_u32(pair)), Dot<Bf16>::load_operand(b + 8 * i));
  }
  return sums;
}
inline void store_narrow(Bf16* out, const Sixteen& a) { store16(out, a); }
inline void store_two_rows(Bf16* tile, int64_t row, const Sixteen& a, const Sixteen& b) {
  Bf16* out = tile + row * 16;
  Bf16 first[16];
  Bf16 second[16];
  store16(first, a);
  store16(second, b);
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = first[i];
    out[2 * i + 1] = second[i];
  }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Optimizers

struct MagnitudeMax {
  uint32x4_t bits = vdupq_n_u32(0);
  void update(Floats v) { bits = vmaxq_u32(bits, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffffu))); }
  uint32_t reduce() const { return vmaxvq_u32(bits); }
};

inline Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats square_root(Floats a) { return vsqrtq_f32(a); }

inline uint32x4_t sign_of(Floats x) { return vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x80000000u)); }
inline Floats with_sign(Floats magnitude, uint32x4_t sign) {
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(magnitude), sign));
}

inline Floats signed_rate(Floats lr, Floats x) {
  const uint32x4_t moves = vorrq_u32(vcltzq_f32(x), vcgtzq_f32(x));
  return vreinterpretq_f32_u32(vandq_u32(moves, veorq_u32(vreinterpretq_u32_f32(lr), sign_of(x))));
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
