// Products by tiles of 16 x 32 bf16 whose sums are fp32, and packing rows into their second operand.
//
// The first operand of a product lies in rows, the second in pairs: row r of a tile holds, for each of 16 columns, the
// elements 2 r and 2 r + 1 of the reduction. That is what AMX tiles and vdpbf16ps take; the plain version reads the
// same layout.
#pragma once

#include "cpu/kernels-sixteen-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kPairedTile = 512;  // 16 x 32
constexpr int64_t kStepLength = 32;   // elements of the reduction in a tile

// Where tile (step, column) of a second operand lies: data + step * step_stride + column * column_stride.
struct PairedTiles {
  const Bf16* data;
  int64_t step_stride;
  int64_t column_stride;
};

#if defined(__AMX_BF16__)

class AttentionTiles {
 public:
  AttentionTiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes a row
      config[48 + tile] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  ~AttentionTiles() { _tile_release(); }
  AttentionTiles(const AttentionTiles&) = delete;
  AttentionTiles& operator=(const AttentionTiles&) = delete;
};

// c [32, 32] (+)= a [32, 32 steps] b.
inline void paired_square(const Bf16* a, int64_t a_stride, const PairedTiles& b, int64_t column, int64_t steps,
                          float* c, int64_t c_stride, bool accumulate) {
  const auto c_bytes = static_cast<size_t>(c_stride * 4);
  const auto a_bytes = static_cast<size_t>(a_stride * 2);
  float* c_low = c + 16 * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c_low, c_bytes);
    _tile_loadd(3, c_low + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const Bf16* left = b.data + column * b.column_stride;
  for (int64_t step = 0; step < steps; ++step) {
    const Bf16* rows = a + step * kStepLength;
    const Bf16* pairs = left + step * b.step_stride;
    _tile_loadd(4, rows, a_bytes);
    _tile_loadd(5, rows + 16 * a_stride, a_bytes);
    _tile_loadd(6, pairs, 64);
    _tile_loadd(7, pairs + b.column_stride, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c_low, c_bytes);
  _tile_stored(3, c_low + 16, c_bytes);
}

#else

class AttentionTiles {};

// sums += a pair of elements of a times 16 pairs of b.
inline Sixteen add_pair(const Bf16* a, const Bf16* pairs, Sixteen sums) {
#if defined(__AVX512BF16__)
  int32_t pair = 0;
  std::memcpy(&pair, a, sizeof pair);
  return {_mm512_dpbf16_ps(sums.v, std::bit_cast<__m512bh>(_mm512_set1_epi32(pair)),
                           std::bit_cast<__m512bh>(_mm512_loadu_si512(pairs)))};
#elif defined(__AVX512BW__)
  const __m512i words = _mm512_loadu_si512(pairs);
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  return fused(splat(to_float(a[1])), {odd}, fused(splat(to_float(a[0])), {even}, sums));
#elif defined(__AVX2__)
  const auto half = [&](const Bf16* from, __m256 sum) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    return _mm256_fmadd_ps(_mm256_set1_ps(to_float(a[1])), odd,
                           _mm256_fmadd_ps(_mm256_set1_ps(to_float(a[0])), even, sum));
  };
  return {half(pairs, sums.low), half(pairs + 16, sums.high)};
#elif defined(QLORA_NATIVE_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  uint32_t pair = 0;
  std::memcpy(&pair, a, sizeof pair);
  for (int i = 0; i < 4; ++i) {
    sums.v[i] =
        vbfdotq_f32(sums.v[i], vreinterpretq_bf16_u32(vdupq_n_u32(pair)), Dot<Bf16>::load_operand(pairs + 8 * i));
  }
  return sums;
#elif defined(QLORA_NATIVE_NEON)
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(pairs + 8 * i)));
    const float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
    const float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000u)));
    sums.v[i] = vfmaq_n_f32(vfmaq_n_f32(sums.v[i], even, to_float(a[0])), odd, to_float(a[1]));
  }
  return sums;
#else
  for (int i = 0; i < 16; ++i) {
    sums.v[i] += to_float(a[0]) * to_float(pairs[2 * i]) + to_float(a[1]) * to_float(pairs[2 * i + 1]);
  }
  return sums;
#endif
}

inline void paired_square(const Bf16* a, int64_t a_stride, const PairedTiles& b, int64_t column, int64_t steps,
                          float* c, int64_t c_stride, bool accumulate) {
  constexpr int kRows = 4;  // with two columns, eight sums at once hide the latency
  const Bf16* left = b.data + column * b.column_stride;
  for (int64_t row = 0; row < 32; row += kRows) {
    Sixteen sums[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      for (int half = 0; half < 2; ++half) {
        sums[r][half] = accumulate ? load16(c + (row + r) * c_stride + half * kSixteen) : splat(0.0f);
      }
    }
    for (int64_t step = 0; step < steps; ++step) {
      const Bf16* pairs = left + step * b.step_stride;
      for (int64_t pair = 0; pair < 16; ++pair) {
        for (int r = 0; r < kRows; ++r) {
          const Bf16* element = a + (row + r) * a_stride + step * kStepLength + 2 * pair;
          sums[r][0] = add_pair(element, pairs + 32 * pair, sums[r][0]);
          sums[r][1] = add_pair(element, pairs + b.column_stride + 32 * pair, sums[r][1]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store16(c + (row + r) * c_stride, sums[r][0]);
      store16(c + (row + r) * c_stride + kSixteen, sums[r][1]);
    }
  }
}

#endif

// c [rows, columns] (+)= a [rows, 32 steps] b; rows and columns are multiples of 32.
inline void paired_product(const Bf16* a, int64_t a_stride, const PairedTiles& b, int64_t rows, int64_t columns,
                           int64_t steps, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t column = 0; column < columns; column += 32) {
    for (int64_t row = 0; row < rows; row += 32) {
      paired_square(a + row * a_stride, a_stride, b, column / 16, steps, c + row * c_stride + column, c_stride,
                    accumulate);
    }
  }
}

// Two vectors of 16 as pairs (a[i], b[i]) in bf16.
inline void store_paired(Bf16* out, Sixteen a, Sixteen b) {
#if defined(__AVX512BF16__)
  const __m512i low = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  const __m512i high = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(b.v)));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  Bf16 first[kSixteen];
  Bf16 second[kSixteen];
  store16(first, a);
  store16(second, b);
  for (int64_t i = 0; i < kSixteen; ++i) {
    out[2 * i] = first[i];
    out[2 * i + 1] = second[i];
  }
#endif
}

inline void store_narrow(Bf16* out, Sixteen a) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), std::bit_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
#else
  store16(out, a);
#endif
}

#if defined(__AVX512BW__)
// Transposes 16 x 16 words of 32 bits.
inline void transpose_16(const __m512i* in, __m512i* out) {
  __m512i a[16];
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + c]: column 4 q + c of rows i..i+3, in quarter q
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
    out[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    out[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    out[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    out[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}
#endif

// in [16, 16] at a stride, transposed.
inline void turn_square(const float* in, int64_t stride, Sixteen* out) {
#if defined(__AVX512BW__)
  __m512i rows[16];
  __m512i turned[16];
  for (int64_t i = 0; i < 16; ++i) {
    rows[i] = _mm512_loadu_si512(in + i * stride);
  }
  transpose_16(rows, turned);
  for (int64_t i = 0; i < 16; ++i) {
    out[i] = {_mm512_castsi512_ps(turned[i])};
  }
#else
  for (int64_t i = 0; i < 16; ++i) {
    float column[16];
    for (int64_t j = 0; j < 16; ++j) {
      column[j] = in[j * stride + i];
    }
    out[i] = load16(column);
  }
#endif
}

// x [length, width] as the second operand x^T [width, padded]: tiles [padded / 16][width / 32].
inline void pack_transposed(const Bf16* x, int64_t row_stride, int64_t length, int64_t padded, int64_t width,
                            Bf16* out) {
  for (int64_t column = 0; column < padded; column += 16) {
    for (int64_t step = 0; step < width; step += kStepLength, out += kPairedTile) {
#if defined(__AVX512BW__)
      __m512i rows[16];
      __m512i turned[16];
      for (int64_t n = 0; n < 16; ++n) {
        rows[n] = column + n < length ? _mm512_loadu_si512(x + (column + n) * row_stride + step) : __m512i{};
      }
      transpose_16(rows, turned);
      for (int64_t r = 0; r < 16; ++r) {
        _mm512_storeu_si512(out + 32 * r, turned[r]);
      }
#else
      for (int64_t n = 0; n < 16; ++n) {
        for (int64_t k = 0; k < kStepLength; ++k) {
          const bool inside = column + n < length;
          out[k / 2 * 32 + 2 * n + k % 2] = inside ? x[(column + n) * row_stride + step + k] : Bf16{0};
        }
      }
#endif
    }
  }
}

// x [length, width] as the second operand x [padded, width]: tiles [padded / 32][width / 16].
inline void pack_rows(const Bf16* x, int64_t row_stride, int64_t length, int64_t padded, int64_t width, Bf16* out) {
  for (int64_t step = 0; step < padded; step += kStepLength) {
    for (int64_t column = 0; column < width; column += 16, out += kPairedTile) {
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = step + 2 * r;
        const Bf16* even = x + row * row_stride + column;
#if defined(__AVX512BW__)
        const __m256i zeros = _mm256_setzero_si256();
        const __m256i first = row < length ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)) : zeros;
        const __m256i second =
            row + 1 < length ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + row_stride)) : zeros;
        _mm512_storeu_si512(out + 32 * r, _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                                                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
#else
        for (int64_t n = 0; n < 16; ++n) {
          out[32 * r + 2 * n] = row < length ? even[n] : Bf16{0};
          out[32 * r + 2 * n + 1] = row + 1 < length ? even[row_stride + n] : Bf16{0};
        }
#endif
      }
    }
  }
}

inline void copy_rows(const Bf16* x, int64_t row_stride, int64_t length, int64_t padded, int64_t width, Bf16* out) {
  for (int64_t row = 0; row < padded; ++row, out += width) {
    if (row < length) {
      std::memcpy(out, x + row * row_stride, static_cast<size_t>(width) * sizeof(Bf16));
    } else {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(width) * sizeof(Bf16));
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
