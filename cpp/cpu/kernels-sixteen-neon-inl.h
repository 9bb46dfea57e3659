// Sixteen floats in four registers of arm64's Advanced SIMD; see kernels-sixteen-inl.h, which includes this.
#pragma once

#include "cpu/vec_neon.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

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

// Lanes i and i + 8, then i + 4, i + 2, i + 1: the order of the plain version.
inline float sum16(const Sixteen& a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
inline float max16(const Sixteen& a) {
  const float32x4_t four = larger_of(larger_of(a.v[0], a.v[2]), larger_of(a.v[1], a.v[3]));
  const float32x4_t two = larger_of(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(larger_of(two, vextq_f32(two, two, 1)), 0);
}

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
