// Forward products with so few tokens that the weight's bytes are the work: rows of W are decoded in registers or in
// the first cache, once for all tokens.
#include <algorithm>

#include "core/layout.h"
#include "core/product.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// y[token, row] = sum + bias + the adapter's part, rounded once.
template <typename T>
inline void finish_output(const ProductJob& job, int64_t token, int64_t row, float sum) {
  if (job.bias != nullptr) {
    sum += to_float(static_cast<const T*>(job.bias)[row]);
  }
  for (int64_t i = 0; i < job.r; ++i) {
    sum += to_float(static_cast<const T*>(job.low)[token * job.r + i]) *
           to_float(static_cast<const T*>(job.up)[row * job.r + i]);
  }
  static_cast<T*>(job.y)[token * job.n + row] = from_float<T>(sum);
}

constexpr int64_t kRowChunk =
    2048;  // elements of a row of W decoded at a time: four KiB of bf16, beside x in the first cache
constexpr int kSharedRows = 2;  // rows of W that share each load of x

// sums[i][r] += x[i, 0:count] . w[r, 0:count] for kTokens rows of x.
template <typename T, int kTokens>
void dot_block(const T* x, int64_t x_stride, const T* w, int64_t count, float (*sums)[kSharedRows]) {
  using D = Dot<T>;
  constexpr int kUnroll = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;  // enough independent sums to hide their latency
  Floats partial[size_t{kTokens}][size_t{kSharedRows}][size_t{kUnroll}];
  for (auto& token : partial) {
    for (auto& row : token) {
      for (Floats& sum : row) {
        sum = zero();
      }
    }
  }
  int64_t i = 0;
  for (; i + kUnroll * D::kStep <= count; i += kUnroll * D::kStep) {
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * D::kStep;
      const auto first = D::load_operand(w + at);
      const auto second = D::load_operand(w + kRowChunk + at);
      for (int token = 0; token < kTokens; ++token) {
        const auto value = D::load_operand(x + token * x_stride + at);
        partial[token][0][u] = D::step(value, first, partial[token][0][u]);
        partial[token][1][u] = D::step(value, second, partial[token][1][u]);
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int row = 0; row < kSharedRows; ++row) {
      float sum = 0.0f;
      for (int u = 0; u < kUnroll; ++u) {
        sum += total(partial[token][row][u]);
      }
      for (int64_t j = i; j < count; ++j) {
        sum += to_float(x[token * x_stride + j]) * to_float(w[row * kRowChunk + j]);
      }
      sums[token][row] += sum;
    }
  }
}

template <typename T>
void dot_tokens(const T* x, int64_t tokens, int64_t x_stride, const T* w, int64_t count, float (*sums)[kSharedRows]) {
  while (tokens > 0) {
    const int64_t taken = tokens >= 8 ? 8 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
    switch (taken) {
      case 8:
        dot_block<T, 8>(x, x_stride, w, count, sums);
        break;
      case 4:
        dot_block<T, 4>(x, x_stride, w, count, sums);
        break;
      case 2:
        dot_block<T, 2>(x, x_stride, w, count, sums);
        break;
      default:
        dot_block<T, 1>(x, x_stride, w, count, sums);
    }
    tokens -= taken;
    x += taken * x_stride;
    sums += taken;
  }
}

template <typename T>
void linear_rows_by_table(const ProductJob& job, int64_t first, int64_t last) {
  alignas(64) T w[kSharedRows * kRowChunk];
  float sums[kMaxTokens][kSharedRows];
  const T* x = static_cast<const T*>(job.x);
  for (int64_t row = first; row < last; row += kSharedRows) {
    const int64_t rows = last - row < kSharedRows ? last - row : kSharedRows;
    std::memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < job.k; k += kRowChunk) {
      const int64_t count = job.k - k < kRowChunk ? job.k - k : kRowChunk;
      for (int64_t r = 0; r < kSharedRows; ++r) {
        const int64_t begin = (row + (r < rows ? r : 0)) * job.k + k;  // a missing second row repeats the first
        dequantize_span<T>(job.weight, begin, begin + count, w + r * kRowChunk);
      }
      dot_tokens(x + k, job.m, job.k, w, count, sums);
    }
    for (int64_t token = 0; token < job.m; ++token) {
      for (int64_t r = 0; r < rows; ++r) {
        finish_output<T>(job, token, row + r, sums[token][r]);
      }
    }
  }
}

#if defined(__AVX512BF16__)

constexpr int64_t kBytesAhead = 16384;  // of W that are called for before they are decoded, at least
constexpr int64_t kScalesAtOnce = kStreamRows * kMaxRowBlocks;  // of as many rows as they belong to

// 128 weights of a row, 64 bytes, are decoded by three shifts and four permutations: word w of the bytes holds elements
// 4 w to 4 w + 3, so every fourth element stands in each vector that comes out, and x is put in that order once a call.
// No broadcast: on Zen 4 one of 128 bits takes the unit that permutes. Levels are looked up unscaled, and each block's
// sum is scaled in fp32.
//
// x [tokens, x_stride] reordered, `scales` [kStreamRows, blocks]. Rows lie one after the other, so what is called for
// ahead is one stream of lines; it must be ahead of all the rows that are read side by side.
template <int kTokens>
void dot_rows(const ProductJob& job, const Bf16* x, const float* scales, __m512i table, int64_t row) {
  const int64_t x_stride = rounded_up(job.k, kStreamChunk);
  const int64_t row_bytes = job.k / 2;
  const uint8_t* bytes = job.weight.packed + row * row_bytes;
  const int64_t distance = std::max(kBytesAhead, kStreamRows * row_bytes);
  const char* ahead = reinterpret_cast<const char*>(bytes) + distance;
  const int64_t blocks = job.k / job.weight.block_size;
  const int half_to_block = std::countr_zero(static_cast<uint64_t>(job.weight.block_size)) - 6;  // halves are of 64
  __m512 total[size_t{kTokens}][size_t{kStreamRows}];
  for (auto& token : total) {
    for (__m512& sum : token) {
      sum = _mm512_setzero_ps();
    }
  }
  const auto scale_of = [&](int r, int64_t half) {
    return _mm_castps_si128(_mm_load_ss(scales + r * blocks + (half >> half_to_block)));
  };
  // `second`: the half whose scale the upper half of the chunk takes.
  const auto step = [&](int64_t chunk, const __m512i* codes, int64_t second) {
    __m512 sum[size_t{kTokens}][size_t{kStreamRows}];
    const Bf16* values = x + chunk * kStreamChunk;
    const auto add_quarter = [&](int quarter, const auto& shifted) {
      for (int r = 0; r < kStreamRows; ++r) {
        const auto w = std::bit_cast<__m512bh>(_mm512_permutexvar_epi16(shifted(codes[r]), table));
        for (int token = 0; token < kTokens; ++token) {
          const __m512 before = quarter == 0 ? _mm512_setzero_ps() : sum[token][r];
          sum[token][r] =
              _mm512_dpbf16_ps(before, w, Dot<Bf16>::load_operand(values + token * x_stride + quarter * 32));
        }
      }
    };
    add_quarter(0, [](__m512i v) { return _mm512_srli_epi16(v, 4); });
    add_quarter(1, [](__m512i v) { return v; });
    add_quarter(2, [](__m512i v) { return _mm512_srli_epi16(v, 12); });
    add_quarter(3, [](__m512i v) { return _mm512_srli_epi16(v, 8); });
    for (int r = 0; r < kStreamRows; ++r) {
      const __m512i first = _mm512_broadcastd_epi32(scale_of(r, 2 * chunk));
      const __m512 scale = _mm512_castsi512_ps(_mm512_mask_broadcastd_epi32(first, 0xff00, scale_of(r, second)));
      for (int token = 0; token < kTokens; ++token) {
        total[token][r] = _mm512_fmadd_ps(sum[token][r], scale, total[token][r]);
      }
    }
  };
  const int64_t chunks = job.k / kStreamChunk;
  __m512i codes[size_t{kStreamRows}];
  for (int64_t chunk = 0; chunk < chunks; ++chunk, ahead += kStreamRows * 64) {
    for (int r = 0; r < kStreamRows; ++r) {
      _mm_prefetch(ahead + 64 * r, _MM_HINT_T1);
      codes[r] = _mm512_loadu_si512(bytes + r * row_bytes + chunk * 64);
    }
    step(chunk, codes, 2 * chunk + 1);
  }
  if (job.k % kStreamChunk != 0) {  // half a chunk, beside zeros of x
    _mm_prefetch(ahead, _MM_HINT_T1);
    for (int r = 0; r < kStreamRows; ++r) {
      const void* from = bytes + r * row_bytes + chunks * 64;
      codes[r] = _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
    }
    step(chunks, codes, 2 * chunks);
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int r = 0; r < kStreamRows; ++r) {
      finish_output<Bf16>(job, token, row + r, _mm512_reduce_add_ps(total[token][r]));
    }
  }
}

inline bool goes_by_streams(const ProductJob& job) {
  const int64_t block_size = job.weight.block_size;
  return job.m <= kStreamTokens && block_size >= 64 && job.k % block_size == 0 && job.k / block_size <= kMaxRowBlocks;
}

// x in the order of the decode, [tokens, rounded_up(k, kStreamChunk)]: vector i of a chunk holds its elements 4 w + i.
void reorder_tokens(const ProductJob& job, void* reordered) {
  if (!goes_by_streams(job)) {
    return;
  }
  alignas(64) static constexpr uint16_t kFourth[32] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
  Bf16* out = static_cast<Bf16*>(reordered);
  for (int64_t token = 0; token < job.m; ++token) {
    const Bf16* x = static_cast<const Bf16*>(job.x) + token * job.k;
    for (int64_t i = 0; i < job.k; i += kStreamChunk, out += kStreamChunk) {
      const bool whole = job.k - i >= kStreamChunk;
      __m512i part[4] = {_mm512_loadu_si512(x + i), _mm512_loadu_si512(x + i + 32)};
      part[2] = whole ? _mm512_loadu_si512(x + i + 64) : _mm512_setzero_si512();
      part[3] = whole ? _mm512_loadu_si512(x + i + 96) : _mm512_setzero_si512();
      for (int quarter = 0; quarter < 4; ++quarter) {
        const __m512i places =
            _mm512_add_epi16(_mm512_load_si512(kFourth), _mm512_set1_epi16(static_cast<int16_t>(quarter)));
        const __m512i low = _mm512_permutex2var_epi16(part[0], places, part[1]);
        const __m512i high = _mm512_permutex2var_epi16(part[2], places, part[3]);
        _mm512_storeu_si512(out + quarter * 32, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
      }
    }
  }
}

template <int kTokens>
void dot_streams(const ProductJob& job, const Bf16* x, __m512i table, int64_t first, int64_t last) {
  alignas(64) float scales[kScalesAtOnce];
  const ScaleDecoder decode_scales_of(job.weight);
  const int64_t blocks = job.k / job.weight.block_size;
  const int64_t rows_at_once = kScalesAtOnce / blocks / kStreamRows * kStreamRows;
  for (int64_t begin = first; begin < last; begin += rows_at_once) {
    const int64_t end = last - begin < rows_at_once ? last : begin + rows_at_once;
    decode_scales_of(begin * blocks, end * blocks, scales);
    for (int64_t row = begin; row < end; row += kStreamRows) {
      dot_rows<kTokens>(job, x, scales + (row - begin) * blocks, table, row);
    }
  }
}

// Rows [first, last) as far as they come in multiples of kStreamRows; returns the first row that is left.
int64_t linear_rows_by_streams(const ProductJob& job, int64_t first, int64_t last, const Bf16* x) {
  const __m256bh levels = _mm512_cvtneps_pbh(_mm512_loadu_ps(job.weight.levels));
  const __m512i table = _mm512_broadcast_i64x4(std::bit_cast<__m256i>(levels));
  const int64_t end = first + (last - first) / kStreamRows * kStreamRows;
  switch (job.m) {
    case 1:
      dot_streams<1>(job, x, table, first, end);
      break;
    case 2:
      dot_streams<2>(job, x, table, first, end);
      break;
    case 3:
      dot_streams<3>(job, x, table, first, end);
      break;
    default:
      dot_streams<4>(job, x, table, first, end);
  }
  return end;
}

constexpr auto kReorderTokens = &reorder_tokens;
#else
constexpr Kernels::ReorderTokens kReorderTokens = nullptr;
#endif

template <typename T>
void linear_rows(const ProductJob& job, int64_t first, int64_t last, [[maybe_unused]] const void* reordered) {
#if defined(__AVX512BF16__)
  if constexpr (Dot<T>::kStep == 32) {
    if (goes_by_streams(job)) {
      first = linear_rows_by_streams(job, first, last, static_cast<const Bf16*>(reordered));
    }
  }
#endif
  linear_rows_by_table<T>(job, first, last);
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
