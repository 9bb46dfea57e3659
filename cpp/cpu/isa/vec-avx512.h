// The operations of vec.h on AVX-512, with BF16 dot products where AVX512-BF16 is compiled for.
#pragma once

#include <immintrin.h>

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

using Floats = __m512;
inline constexpr int kLanes = 16;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Floats load(const Fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
// Lanes [kFirst, kFirst + kLanes) of 16 signed bytes.
template <int kFirst>
inline Floats widened(Bytes16 codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(std::bit_cast<__m128i>(codes)));
}
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
// Lanes i and i + 8, then i + 4, i + 2, i + 1.
inline float total(Floats v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float total_by_halves(Floats v) { return total(v); }

// The streaming store goes past the caches and needs an aligned target.
template <bool kStream>
inline void store_vector(void* p, __m512i v) {
  if constexpr (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(p), v);
  } else {
    _mm512_storeu_si512(p, v);
  }
}

template <>
class Decoder<float> {
 public:
  static constexpr int kBytes = 8;  // packed bytes a step
  Decoder(const float* levels, float scale) : table_(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale))) {}
  template <bool kStream = false>
  void step(const uint8_t* bytes, float* out) const {
    int64_t pairs = 0;
    std::memcpy(&pairs, bytes, sizeof pairs);
    // Each byte comes to stand in the two 32-bit lanes of its elements; permutexvar reads four bits of each.
    const __m512i spread = _mm512_set_epi32(0x07070707, 0x07070707, 0x06060606, 0x06060606, 0x05050505, 0x05050505,
                                            0x04040404, 0x04040404, 0x03030303, 0x03030303, 0x02020202, 0x02020202,
                                            0x01010101, 0x01010101, 0x00000000, 0x00000000);
    const __m512i words = _mm512_shuffle_epi8(_mm512_set1_epi64(pairs), spread);
    const __m512i index = _mm512_srlv_epi32(words, _mm512_set1_epi64(4));
    store_vector<kStream>(out, _mm512_castps_si512(_mm512_permutexvar_ps(index, table_)));
  }

 private:
  __m512 table_;
};

// bf16 kept in the upper half of an fp32, the lower half zero. A NaN must be the canonical one.
inline __m512i bf16_bits(Floats v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

// Each rounded value in both halves of its lane.
inline __m512i bf16_twice(__m512 v) {
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_or_epi32(bf16_bits(v), nan, _mm512_castps_si512(v), _mm512_set1_epi32(0x400000));
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(high, 16), high);
}

inline __m256i round_to_bf16(__m512 v) { return _mm512_cvtepi32_epi16(bf16_twice(v)); }

inline __m512i fp16_twice(__m512 v) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return _mm512_or_si512(_mm512_slli_epi32(low, 16), low);
}

class Decoder16 {
 public:
  static constexpr int kBytes = 16;
  explicit Decoder16(__m512i twice) : table_(twice) {}
  template <bool kStream = false>
  void step(const uint8_t* bytes, void* out) const {
    // Each byte comes to stand in the high bytes of the two words of its elements. vpermw reads five bits of a word:
    // the nibble belongs in the upper four, the lowest is free because every entry stands in the table twice.
    const __m512i spread =
        _mm512_set_epi64(0x0f0f0f0f0e0e0e0e, 0x0d0d0d0d0c0c0c0c, 0x0b0b0b0b0a0a0a0a, 0x0909090908080808,
                         0x0707070706060606, 0x0505050504040404, 0x0303030302020202, 0x0101010100000000);
    const __m512i line = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(line, spread), _mm512_set1_epi32(7 << 16 | 11));
    store_vector<kStream>(out, _mm512_permutexvar_epi16(index, table_));
  }

 private:
  __m512i table_;
};

template <>
class Decoder<Bf16> : public Decoder16 {
 public:
  Decoder(const float* levels, float scale)
      : Decoder16(bf16_twice(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale)))) {}
};

template <>
class Decoder<Fp16> : public Decoder16 {
 public:
  Decoder(const float* levels, float scale)
      : Decoder16(fp16_twice(_mm512_mul_ps(load(levels), _mm512_set1_ps(scale)))) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Panels

using Words = __m512i;
inline constexpr int kMicroRows = 12;  // a tile of sums: 12 x 2 registers, and 2 of the panel, 1 of x
inline constexpr int kTileVectors = 2;

template <unsigned kBits>
inline Words shift_right(Words v) {
  return kBits == 0 ? v : _mm512_srli_epi32(v, kBits);
}

template <typename T>
inline Floats round_through(Floats v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (kIsBf16<T>) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(v), upper));
  } else {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}
// Two vectors that round_through<Bf16> made, as pairs: `even` in the lower halves.
inline Floats pair_up(Floats even, Floats odd) {
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd)));
}

// The 16 levels; `at` reads the lowest four bits of each lane.
struct LevelTable {
  __m512 level;
  explicit LevelTable(const float* levels) : level(load(levels)) {}
  template <typename T>
  LevelTable scaled(float scale) const {
    LevelTable result = *this;
    result.level = round_through<T>(multiply(level, _mm512_set1_ps(scale)));
    return result;
  }
  Floats at(Words codes) const { return _mm512_permutexvar_ps(codes, level); }
};

// The codes of kLanes elements in their order; the first is even where kLanes is.
inline Words natural_codes(const uint8_t* packed, int64_t element) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + element / 2));
  const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
  return _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32));
}

// Lane l of out[d] = bytes 4 d to 4 d + 3 of rows[l] + offset.
inline void transpose_codes(const uint8_t* const* rows, int64_t offset, Words* out) {
  const auto four = [&](int first) {
    const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
    __m512i v = _mm512_castsi128_si512(piece(first));
    v = _mm512_inserti32x4(v, piece(first + 4), 1);
    v = _mm512_inserti32x4(v, piece(first + 8), 2);
    return _mm512_inserti32x4(v, piece(first + 12), 3);
  };
  const __m512i a = four(0);
  const __m512i b = four(1);
  const __m512i c = four(2);
  const __m512i d = four(3);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_high = _mm512_unpackhi_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

#if defined(__AVX512BF16__)
template <>
struct Dot<Bf16> {
  static constexpr int kStep = 32;
  static __m512bh load_operand(const Bf16* p) { return std::bit_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Floats step(__m512bh a, __m512bh b, Floats sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

template <>
struct WordProduct<Bf16> {
  static constexpr int kElements = 2;
  static Floats step(Floats x, Floats w, Floats sum) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(x), std::bit_cast<__m512bh>(w));
  }
};

// The scaled levels of two rows, rounded to bf16: 16 of the first, 16 of the second.
struct PairTable {
  __m512i level;
  PairTable(Floats levels, float scale, float scale_below)
      : level(std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(multiply(levels, _mm512_set1_ps(scale_below)),
                                                         multiply(levels, _mm512_set1_ps(scale))))) {}
  // Words of elements 16 half to 16 half + 15 of the rows' 32, in their order: the first row's in the lower halves.
  Floats at(const uint8_t* bytes, const uint8_t* bytes_below, int half) const {
    const auto piece = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    const __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(bytes)), piece(bytes_below), 1);
    const int64_t first = half == 0 ? 0x0008000000080000 : 0x000c0004000c0004;
    const __m512i four = _mm512_set_epi64(0x0003000300030003, 0x0003000300030003, 0x0002000200020002,
                                          0x0002000200020002, 0x0001000100010001, 0x0001000100010001, 0, 0);
    const __m512i taken = _mm512_add_epi16(four, _mm512_set1_epi64(first));
    const __m512i shift = _mm512_set4_epi32(0x00080008, 0x000c000c, 0, 0x00040004);
    const __m512i codes = _mm512_srlv_epi16(_mm512_permutexvar_epi16(taken, _mm512_castsi256_si512(rows)), shift);
    const __m512i index = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(15), _mm512_set1_epi32(0x100000), 0xea);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, level));
  }
};
#endif

inline void store_as(float* p, Floats v) { store(p, v); }
inline void store_as(Bf16* p, Floats v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(v)); }
inline void store_as(Fp16* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// v[i] lane j becomes v[j] lane i, for floats and for integers of 32 bits.
template <typename Vector>
inline void transpose(Vector (&v)[16]) {
  __m512i a[16];
  __m512i b[16];
  const auto bits = [&](int i) { return std::bit_cast<__m512i>(v[i]); };
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(bits(i), bits(i + 1));
    a[i + 1] = _mm512_unpackhi_epi32(bits(i), bits(i + 1));
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + c]: column 4 q + c of rows i to i + 3, in quarter q
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee);
    v[c] = std::bit_cast<Vector>(_mm512_shuffle_i32x4(low01, low23, 0x88));
    v[4 + c] = std::bit_cast<Vector>(_mm512_shuffle_i32x4(low01, low23, 0xdd));
    v[8 + c] = std::bit_cast<Vector>(_mm512_shuffle_i32x4(high01, high23, 0x88));
    v[12 + c] = std::bit_cast<Vector>(_mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

// Lane l of the four vectors holds elements 4 l to 4 l + 3: its 16 bits, shifted to each nibble in turn.
template <typename T>
class StreamLevels {
 public:
  explicit StreamLevels(const float* levels) : table_(levels) {}

  // use(v, levels of the elements that element_of() names for slots kLanes v to kLanes v + kLanes - 1)
  template <typename Use>
  void decode(const uint8_t* bytes, const Use& use) const {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    use(0, table_.at(shift_right<4>(words)));
    use(1, table_.at(words));
    use(2, table_.at(shift_right<12>(words)));
    use(3, table_.at(shift_right<8>(words)));
  }
  static constexpr int element_of(int slot) { return slot % 16 * 4 + slot / 16; }

 private:
  LevelTable table_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Sixteen lanes

struct Sixteen {
  __m512 v;
};
struct SixteenInts {
  __m512i v;
};

inline Sixteen splat(float x) { return {_mm512_set1_ps(x)}; }
inline Sixteen operator+(Sixteen a, Sixteen b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Sixteen operator-(Sixteen a, Sixteen b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Sixteen operator*(Sixteen a, Sixteen b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Sixteen operator/(Sixteen a, Sixteen b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Sixteen fused(Sixteen a, Sixteen b, Sixteen c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
// a > b ? a : b, and so on: with NaN in b the result is b.
inline Sixteen larger(Sixteen a, Sixteen b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Sixteen smaller(Sixteen a, Sixteen b) { return {_mm512_min_ps(a.v, b.v)}; }
inline SixteenInts bits_of(Sixteen a) { return {_mm512_castps_si512(a.v)}; }
inline SixteenInts operator+(SixteenInts a, int32_t b) { return {_mm512_add_epi32(a.v, _mm512_set1_epi32(b))}; }
inline SixteenInts operator-(SixteenInts a, SixteenInts b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline SixteenInts half_of(SixteenInts a) { return {_mm512_srai_epi32(a.v, 1)}; }
// 2^(a) as a float, for exponents of normal numbers.
inline Sixteen power_of_two(SixteenInts a) { return {_mm512_castsi512_ps(_mm512_slli_epi32((a + 127).v, 23))}; }

template <typename T>
inline Sixteen load16(const T* p) {
  return {load(p)};
}
template <typename T>
inline void store16(T* p, Sixteen a) {
  store_as(p, a.v);
}

template <typename T>
inline Sixteen rounded(Sixteen a);
template <>
inline Sixteen rounded<Bf16>(Sixteen a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bf16(a.v)), 16))};
}

inline float sum16(Sixteen a) { return total(a.v); }
inline float max16(Sixteen a) {  // in the order of total()
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline constexpr int kSixteenRows = 8;  // a tile of sums that stays in registers
inline constexpr int kSixteenColumns = 2;
inline Sixteen multiply_add(Sixteen a, Sixteen b, Sixteen sum) { return fused(a, b, sum); }

// Words of 32 bits, [16, 16] from `in` on, rows `stride` bytes apart, transposed.
inline void transpose_16(const void* in, int64_t stride, Sixteen* out) {
  Floats v[16];
  for (int i = 0; i < 16; ++i) {
    v[i] = _mm512_loadu_ps(static_cast<const unsigned char*>(in) + i * stride);
  }
  transpose(v);
  for (int i = 0; i < 16; ++i) {
    out[i] = {v[i]};
  }
}

#if defined(__AVX512BF16__)
#define QLORA_NATIVE_BF16_PAIRS
// sums += a pair of elements of a times 16 pairs of b.
inline Sixteen add_products(const Bf16* a, const Bf16* b, Sixteen sums) {
  int32_t pair = 0;
  std::memcpy(&pair, a, sizeof pair);
  return {_mm512_dpbf16_ps(sums.v, std::bit_cast<__m512bh>(_mm512_set1_epi32(pair)),
                           std::bit_cast<__m512bh>(_mm512_loadu_si512(b)))};
}
inline void store_narrow(Bf16* out, Sixteen a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), std::bit_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
// Rows `row` (an even one) and row + 1 of a tile of pairs.
inline void store_two_rows(Bf16* tile, int64_t row, Sixteen a, Sixteen b) {
  const __m512i low = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  const __m512i high = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(b.v)));
  _mm512_storeu_si512(tile + row * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Optimizers

// Magnitudes of IEEE floats are ordered like their bits, and anything non-finite lies above all finite values.
struct MagnitudeMax {
  __m512i bits = _mm512_setzero_si512();
  void update(Floats v) {
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  uint32_t reduce() const { return _mm512_reduce_max_epu32(bits); }
};

inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats square_root(Floats a) { return _mm512_sqrt_ps(a); }

// lr with the sign of x; 0 where x is 0 or NaN.
inline Floats signed_rate(Floats lr, Floats x) {
  const __mmask16 moves = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  return _mm512_maskz_xor_ps(moves, lr, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
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

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
