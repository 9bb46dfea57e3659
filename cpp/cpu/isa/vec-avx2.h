// The operations of vec.h on AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

using Floats = __m256;
inline constexpr int kLanes = 8;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Floats load(const Fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <int kFirst>
inline Floats widened(Bytes16 codes) {
  const auto bytes = std::bit_cast<__m128i>(codes);
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(kFirst == 0 ? bytes : _mm_srli_si128(bytes, kFirst)));
}
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
// Lanes i and i + 4, then i + 2, i + 1.
inline float total(Floats v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float total_by_halves(Floats v) { return total(v); }

template <bool kStream>
inline void store_vector(void* p, __m256i v) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(p), v);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
}

template <>
class Decoder<float> {
 public:
  static constexpr int kBytes = 4;
  Decoder(const float* levels, float scale)
      : low_(_mm256_mul_ps(load(levels), _mm256_set1_ps(scale))),
        high_(_mm256_mul_ps(load(levels + 8), _mm256_set1_ps(scale))) {}
  template <bool kStream = false>
  void step(const uint8_t* bytes, float* out) const {
    int32_t word = 0;
    std::memcpy(&word, bytes, sizeof word);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
    // Bits 0-2 choose within a half, bit 3, moved to the sign, between the halves.
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    const __m256 low = _mm256_permutevar8x32_ps(low_, index);
    const __m256 high = _mm256_permutevar8x32_ps(high_, index);
    store_vector<kStream>(out, _mm256_castps_si256(_mm256_blendv_ps(low, high, half)));
  }

 private:
  __m256 low_;
  __m256 high_;
};

// 16 values rounded to T, in order.
template <typename T>
__m256i rounded(__m256 low, __m256 high);

// bf16 kept in the upper half of an fp32, the lower half not cleared. A NaN must be the canonical one.
inline __m256i bf16_bits(Floats v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
inline __m256i bf16_words(__m256 v) {
  const __m256i quieted = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(bf16_bits(v), quieted, nan), 16);
}

template <>
inline __m256i rounded<Bf16>(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_words(low), bf16_words(high)), 0xd8);
}

template <>
inline __m256i rounded<Fp16>(__m256 low, __m256 high) {
  return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}

// pshufb looks up bytes, so a table of 16-bit values is held as a plane of low bytes and one of high bytes, each in
// both 128-bit lanes.
template <typename T>
class Decoder {
 public:
  static constexpr int kBytes = 16;
  Decoder(const float* levels, float scale) {
    const __m256 by = _mm256_set1_ps(scale);
    const __m256i table = rounded<T>(_mm256_mul_ps(load(levels), by), _mm256_mul_ps(load(levels + 8), by));
    const __m256i low = _mm256_and_si256(table, _mm256_set1_epi16(0xff));
    const __m256i planes = _mm256_packus_epi16(low, _mm256_srli_epi16(table, 8));
    low_ = _mm256_permute4x64_epi64(planes, 0x88);
    high_ = _mm256_permute4x64_epi64(planes, 0xdd);
  }
  template <bool kStream = false>
  void step(const uint8_t* bytes, T* out) const {
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(raw, 4), nibble);
    const __m128i odd = _mm_and_si128(raw, nibble);
    const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i low = _mm256_shuffle_epi8(low_, index);
    const __m256i high = _mm256_shuffle_epi8(high_, index);
    const __m256i first = _mm256_unpacklo_epi8(low, high);
    const __m256i second = _mm256_unpackhi_epi8(low, high);
    store_vector<kStream>(out, _mm256_permute2x128_si256(first, second, 0x20));
    store_vector<kStream>(out + 16, _mm256_permute2x128_si256(first, second, 0x31));
  }

 private:
  __m256i low_;
  __m256i high_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Panels

using Words = __m256i;
inline constexpr int kMicroRows = 6;
inline constexpr int kTileVectors = 2;

template <unsigned kBits>
inline Words shift_right(Words v) {
  return kBits == 0 ? v : _mm256_srli_epi32(v, kBits);
}

template <typename T>
inline Floats round_through(Floats v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (kIsBf16<T>) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(v), upper));
  } else {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}
inline Floats pair_up(Floats even, Floats odd) {
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd)));
}

struct LevelTable {
  __m256 low;
  __m256 high;
  explicit LevelTable(const float* levels) : low(load(levels)), high(load(levels + 8)) {}
  template <typename T>
  LevelTable scaled(float scale) const {
    LevelTable result = *this;
    result.low = round_through<T>(multiply(low, _mm256_set1_ps(scale)));
    result.high = round_through<T>(multiply(high, _mm256_set1_ps(scale)));
    return result;
  }
  Floats at(Words codes) const {
    // Bits 0-2 choose within a half, bit 3, moved to the sign, between the halves.
    const __m256 half = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), half);
  }
};

inline Words natural_codes(const uint8_t* packed, int64_t element) {
  int32_t word = 0;
  std::memcpy(&word, packed + element / 2, sizeof word);
  return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}

inline void transpose_codes(const uint8_t* const* rows, int64_t offset, Words* out) {
  const auto two = [&](int first) {
    const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(piece(first)), piece(first + 4), 1);
  };
  const __m256i a = two(0);
  const __m256i b = two(1);
  const __m256i c = two(2);
  const __m256i d = two(3);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_high = _mm256_unpackhi_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}

inline void store_as(float* p, Floats v) { store(p, v); }
inline void store_as(Bf16* p, Floats v) {
  const __m256i words = bf16_words(v);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store_as(Fp16* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// The 4 x 4 matrices in both halves, transposed.
inline void turn(__m256 a, __m256 b, __m256 c, __m256 d, __m256* out) {
  const __m256 ab_low = _mm256_unpacklo_ps(a, b);
  const __m256 ab_high = _mm256_unpackhi_ps(a, b);
  const __m256 cd_low = _mm256_unpacklo_ps(c, d);
  const __m256 cd_high = _mm256_unpackhi_ps(c, d);
  out[0] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
  out[1] = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
  out[2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
  out[3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
}

// v[i] lane j becomes v[j] lane i.
inline void transpose(Floats (&v)[kLanes]) {
  __m256 transposed[8];
  turn(v[0], v[1], v[2], v[3], transposed);
  turn(v[4], v[5], v[6], v[7], transposed + 4);
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(transposed[c], transposed[4 + c], 0x20);
    v[4 + c] = _mm256_permute2f128_ps(transposed[c], transposed[4 + c], 0x31);
  }
}

#define QLORA_NATIVE_BYTE_LOOK_UPS
using Bytes = __m256i;  // 16 bytes in each of two lanes, which no operation below crosses
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes load_table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes high_nibbles(Bytes v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
inline Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes look_up(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }
inline Bytes zip_low(Bytes even, Bytes odd) { return _mm256_unpacklo_epi8(even, odd); }
inline Bytes zip_high(Bytes even, Bytes odd) { return _mm256_unpackhi_epi8(even, odd); }
// fp32 values whose upper halves are the even 16-bit words, or the odd ones.
inline Floats even_floats(Bytes upper) { return _mm256_castsi256_ps(_mm256_slli_epi32(upper, 16)); }
inline Floats odd_floats(Bytes upper) {
  return _mm256_castsi256_ps(_mm256_and_si256(upper, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// fp32 values of the first words of each lane and of the last, from their upper and lower halves.
inline Floats first_floats(Bytes upper, Bytes lower) {
  return _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower, upper));
}
inline Floats last_floats(Bytes upper, Bytes lower) { return _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower, upper)); }

// ---------------------------------------------------------------------------------------------------------------------
// Sixteen lanes

struct Sixteen {
  __m256 low, high;
};
struct SixteenInts {
  __m256i low, high;
};

inline Sixteen splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Sixteen operator+(Sixteen a, Sixteen b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Sixteen operator-(Sixteen a, Sixteen b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Sixteen operator*(Sixteen a, Sixteen b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Sixteen operator/(Sixteen a, Sixteen b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Sixteen fused(Sixteen a, Sixteen b, Sixteen c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Sixteen larger(Sixteen a, Sixteen b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Sixteen smaller(Sixteen a, Sixteen b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline SixteenInts bits_of(Sixteen a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline SixteenInts operator+(SixteenInts a, int32_t b) {
  const __m256i addend = _mm256_set1_epi32(b);
  return {_mm256_add_epi32(a.low, addend), _mm256_add_epi32(a.high, addend)};
}
inline SixteenInts operator-(SixteenInts a, SixteenInts b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
inline SixteenInts half_of(SixteenInts a) { return {_mm256_srai_epi32(a.low, 1), _mm256_srai_epi32(a.high, 1)}; }
inline Sixteen power_of_two(SixteenInts a) {
  const SixteenInts biased = a + 127;
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased.low, 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(biased.high, 23))};
}

template <typename T>
inline Sixteen load16(const T* p) {
  return {load(p), load(p + 8)};
}
template <typename T>
inline void store16(T* p, Sixteen a) {
  store_as(p, a.low);
  store_as(p + 8, a.high);
}
inline void store16(Bf16* p, Sixteen a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded<Bf16>(a.low, a.high));
}

inline float sum16(Sixteen a) { return total(_mm256_add_ps(a.low, a.high)); }
inline float max16(Sixteen a) {  // in the order of total()
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline constexpr int kSixteenRows = 6;  // 12 registers, 2 of the second operand, 1 of the first
inline constexpr int kSixteenColumns = 1;
inline Sixteen multiply_add(Sixteen a, Sixteen b, Sixteen sum) { return fused(a, b, sum); }

// Through loads of half a register, which cost less than moving halves between registers.
inline void transpose_16(const void* in, int64_t stride, Sixteen* out) {
  const auto four = [&](int64_t row, int64_t column) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const unsigned char*>(in) + row * stride) + column);
  };
  const auto eight = [&](int64_t first, int64_t column, __m256* transposed) {  // [8, 8] of it
    const auto halves = [&](int64_t row, int64_t i) {                          // of rows `row` and row + 4
      return _mm256_insertf128_ps(_mm256_castps128_ps256(four(row, i)), four(row + 4, i), 1);
    };
    for (int64_t i = 0; i < 8; i += 4) {
      const int64_t at = column + i;
      turn(halves(first, at), halves(first + 1, at), halves(first + 2, at), halves(first + 3, at), transposed + i);
    }
  };
  for (int column = 0; column < 16; column += 8) {
    __m256 top[8];
    __m256 bottom[8];
    eight(0, column, top);
    eight(8, column, bottom);
    for (int i = 0; i < 8; ++i) {
      out[column + i] = {top[i], bottom[i]};
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizers

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

inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats square_root(Floats a) { return _mm256_sqrt_ps(a); }
inline Floats sign_of(Floats x) { return _mm256_and_ps(x, _mm256_set1_ps(-0.0f)); }

inline Floats signed_rate(Floats lr, Floats x) {
  const __m256 moves = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  return _mm256_and_ps(moves, _mm256_xor_ps(lr, sign_of(x)));
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

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
