// The vector operations of the optimisers, beside those of vec.h. All round once: nothing here is fused unless the
// product is exact.
#pragma once

#include "core/optim.h"
#include "core/state_code.h"
#include "cpu/vec.h"

#if defined(QLORA_NATIVE_NEON)
#include "cpu/vec_optim_neon.h"
#endif

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

#if defined(__AVX512BW__)

// Magnitudes of IEEE floats are ordered like their bits, and anything non-finite lies above all finite values.
struct MagnitudeMax {
  __m512i bits = _mm512_setzero_si512();
  void update(Floats v) {
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  uint32_t reduce() const { return _mm512_reduce_max_epu32(bits); }
};

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats square_root(Floats a) { return _mm512_sqrt_ps(a); }

// lr with the sign of x; 0 where x is 0 or NaN.
inline Floats signed_rate(Floats lr, Floats x) {
  const __mmask16 moves = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  return _mm512_maskz_or_ps(moves, lr, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

inline void store_rounded(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void store_rounded(Bf16* p, Floats v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(v)); }
inline void store_rounded(Fp16* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

class StateDecoder {
 public:
  explicit StateDecoder(const StateCode& code)
      : a_(_mm512_broadcast_f32x8(_mm256_loadu_ps(code.a))), b_(_mm512_broadcast_f32x8(_mm256_loadu_ps(code.b))) {}

  Floats operator()(const int8_t* codes) const {
    const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(codes)));
    const __m512i segment = _mm512_srli_epi32(_mm512_castps_si512(value), 23);  // the sign lands above the index
    const __m512 a = _mm512_permutexvar_ps(segment, a_);
    // a | (value & sign)
    const __m512i with_sign = _mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(value),
                                                        _mm512_set1_epi32(INT32_MIN), kFirstXorSecondAndThird);
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(segment, b_), value, _mm512_castsi512_ps(with_sign));
  }
  Floats operator()(const uint8_t* codes) const {
    const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(codes)));
    const __m512i segment = _mm512_srli_epi32(_mm512_castps_si512(value), 23);
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(segment, b_), value, _mm512_permutexvar_ps(segment, a_));
  }

 private:
  static constexpr int kFirstXorSecondAndThird = 0x78;
  static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  __m512 a_;
  __m512 b_;
};

using Ints = __m512i;

// Four vectors of codes, saturated to bytes, in order.
template <typename Code>
inline void store_bytes(Code* p, Ints a, Ints b, Ints c, Ints d) {
  const __m512i ab = _mm512_packs_epi32(a, b);
  const __m512i cd = _mm512_packs_epi32(c, d);
  const __m512i bytes =
      sizeof(Code) == 1 && Code(-1) < Code(0) ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}

class StateEncoder {
 public:
  explicit StateEncoder(const StateCode& code)
      : alpha_low_(_mm512_loadu_ps(code.alpha)),
        alpha_high_(_mm512_loadu_ps(code.alpha + 16)),
        beta_low_(_mm512_loadu_ps(code.beta)),
        beta_high_(_mm512_loadu_ps(code.beta + 16)),
        lowest_(all(code.lowest)) {}

  // The saturation of store_bytes is the clamp at the top.
  Ints of_signed(Floats x) const {
    constexpr int kLargerMagnitudeWithSignOfFirst = 0b0011;
    const __m512 clamped = _mm512_range_ps(x, lowest_, kLargerMagnitudeWithSignOfFirst);
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(clamped), 23);
    const __m512 product = _mm512_mul_ps(clamped, _mm512_permutex2var_ps(beta_low_, exponent, beta_high_));
    const __m512 alpha = _mm512_permutex2var_ps(alpha_low_, exponent, alpha_high_);
    const __m512i with_sign = _mm512_ternarylogic_epi32(_mm512_castps_si512(alpha), _mm512_castps_si512(x),
                                                        _mm512_set1_epi32(INT32_MIN), kFirstXorSecondAndThird);
    return _mm512_cvtps_epi32(_mm512_add_ps(product, _mm512_castsi512_ps(with_sign)));
  }
  Ints of_unsigned(Floats x) const {
    const __m512 clamped = _mm512_max_ps(x, lowest_);
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(clamped), 23);
    const __m512 product = _mm512_mul_ps(clamped, _mm512_permutex2var_ps(beta_low_, exponent, beta_high_));
    return _mm512_cvtps_epi32(_mm512_add_ps(product, _mm512_permutex2var_ps(alpha_low_, exponent, alpha_high_)));
  }

 private:
  static constexpr int kFirstXorSecondAndThird = 0x78;
  __m512 alpha_low_;
  __m512 alpha_high_;
  __m512 beta_low_;
  __m512 beta_high_;
  __m512 lowest_;
};

// kNormLanes running sums: element i goes to sum i % kNormLanes. A product of two floats is exact in double.
class SquareSums {
 public:
  void update(const float* x) {
    for (int i = 0; i < 4; ++i) {
      const __m512d v = _mm512_cvtps_pd(_mm256_loadu_ps(x + 8 * i));
      sums_[i] = _mm512_fmadd_pd(v, v, sums_[i]);
    }
  }
  void store(double* p) const {
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_pd(p + 8 * i, sums_[i]);
    }
  }

 private:
  __m512d sums_[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
};

#elif defined(__AVX2__)

struct MagnitudeMax {
  __m256i bits = _mm256_setzero_si256();
  void update(Floats v) {
    bits = _mm256_max_epu32(bits, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
  }
  uint32_t reduce() const {
    alignas(32) uint32_t lane[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), bits);
    uint32_t highest = 0;
    for (const uint32_t value : lane) {
      highest = value > highest ? value : highest;
    }
    return highest;
  }
};

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats square_root(Floats a) { return _mm256_sqrt_ps(a); }
inline Floats sign_of(Floats x) { return _mm256_and_ps(x, _mm256_set1_ps(-0.0f)); }

inline Floats signed_rate(Floats lr, Floats x) {
  const __m256 moves = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  return _mm256_and_ps(moves, _mm256_or_ps(lr, sign_of(x)));
}

inline void store_rounded(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline void store_rounded(Bf16* p, Floats v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quieted = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quieted, nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store_rounded(Fp16* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

class StateDecoder {
 public:
  explicit StateDecoder(const StateCode& code) : a_(_mm256_loadu_ps(code.a)), b_(_mm256_loadu_ps(code.b)) {}

  Floats operator()(const int8_t* codes) const { return decode(_mm256_cvtepi8_epi32(load8(codes))); }
  Floats operator()(const uint8_t* codes) const { return decode(_mm256_cvtepu8_epi32(load8(codes))); }

 private:
  static __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  Floats decode(__m256i code) const {
    const __m256 value = _mm256_cvtepi32_ps(code);
    const __m256i segment = _mm256_srli_epi32(_mm256_castps_si256(value), 23);
    const __m256 a = _mm256_xor_ps(_mm256_permutevar8x32_ps(a_, segment), sign_of(value));
    return _mm256_add_ps(_mm256_mul_ps(_mm256_permutevar8x32_ps(b_, segment), value), a);
  }
  __m256 a_;
  __m256 b_;
};

using Ints = __m256i;

template <typename Code>
inline void store_bytes(Code* p, Ints a, Ints b, Ints c, Ints d) {
  const __m256i ab = _mm256_packs_epi32(a, b);
  const __m256i cd = _mm256_packs_epi32(c, d);
  const __m256i bytes = Code(-1) < Code(0) ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
}

class StateEncoder {
 public:
  explicit StateEncoder(const StateCode& code) : code_(code), lowest_(all(code.lowest)) {}

  Ints of_signed(Floats x) const {
    const __m256 sign = sign_of(x);
    return _mm256_cvtps_epi32(_mm256_xor_ps(position(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x)), sign));
  }
  Ints of_unsigned(Floats x) const { return _mm256_cvtps_epi32(position(x)); }

 private:
  Floats position(Floats x) const {
    const __m256 clamped = _mm256_max_ps(x, lowest_);
    const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(clamped), 23);
    const __m256i index = _mm256_and_si256(exponent, _mm256_set1_epi32(31));
    const __m256 product = _mm256_mul_ps(clamped, _mm256_i32gather_ps(code_.beta, index, 4));
    return _mm256_add_ps(product, _mm256_i32gather_ps(code_.alpha, index, 4));
  }
  const StateCode& code_;
  __m256 lowest_;
};

class SquareSums {
 public:
  void update(const float* x) {
    for (int i = 0; i < 8; ++i) {
      const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x + 4 * i));
      sums_[i] = _mm256_fmadd_pd(v, v, sums_[i]);
    }
  }
  void store(double* p) const {
    for (int i = 0; i < 8; ++i) {
      _mm256_storeu_pd(p + 4 * i, sums_[i]);
    }
  }

 private:
  __m256d sums_[8] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                      _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
};

#elif !defined(QLORA_NATIVE_NEON)  // one lane: the rule itself

struct MagnitudeMax {
  uint32_t bits = 0;
  void update(Floats v) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(v.value) & 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  uint32_t reduce() const { return bits; }
};

inline Floats normalise(Floats v, const Normaliser& by) { return {by(v.value)}; }

inline Floats all(float x) { return {x}; }
inline Floats subtract(Floats a, Floats b) { return {a.value - b.value}; }
inline Floats square_root(Floats a) { return {__builtin_sqrtf(a.value)}; }
inline Floats signed_rate(Floats lr, Floats x) {
  return {x.value > 0.0f ? lr.value : x.value < 0.0f ? -lr.value : 0.0f};
}

template <typename T>
inline void store_rounded(T* p, Floats v) {
  *p = from_float<T>(v.value);
}

class StateDecoder {
 public:
  explicit StateDecoder(const StateCode&) {}
  Floats operator()(const int8_t* codes) const { return {decode_state(kSignedState, *codes)}; }
  Floats operator()(const uint8_t* codes) const { return {decode_state(kUnsignedState, *codes)}; }
};

using Ints = int;

template <typename Code>
inline void store_bytes(Code* p, Ints a, Ints b, Ints c, Ints d) {
  p[0] = static_cast<Code>(a);
  p[1] = static_cast<Code>(b);
  p[2] = static_cast<Code>(c);
  p[3] = static_cast<Code>(d);
}

class StateEncoder {
 public:
  explicit StateEncoder(const StateCode&) {}
  Ints of_signed(Floats x) const { return encode_signed(kSignedState, x.value); }
  Ints of_unsigned(Floats x) const { return encode_unsigned(kUnsignedState, x.value); }
};

class SquareSums {
 public:
  void update(const float* x) {
    for (int i = 0; i < kNormLanes; ++i) {
      const double v = static_cast<double>(x[i]);
      sums_[i] += v * v;
    }
  }
  void store(double* p) const { std::memcpy(p, sums_, sizeof sums_); }

 private:
  double sums_[kNormLanes] = {};
};

#endif

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
