// Forward products with so few tokens that the weight's bytes are the work: rows of W are decoded in registers or in
// the first cache, once for all tokens.
#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/product.h"
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

constexpr int64_t kBytesAhead = 4096;                           // of W that are called for before they are decoded
constexpr int64_t kScalesAtOnce = kStreamRows * kMaxRowBlocks;  // of as many rows as they belong to

// The levels are looked up unscaled, and each block's sum is scaled in fp32: a shift, a permutation and a dot product
// for 32 weights. `x` [tokens, k] stands in the order in which the decode leaves a row (kernels-tiles-inl.h), `scales`
// [kRows, blocks]. Rows lie one after the other, so what is called for ahead is one stream of lines; it must be
// ahead of all the rows that are read side by side.
template <int kTokens, int kRows, bool kLong>
void dot_rows(const ProductJob& job, const Bf16* x, const float* scales, __m512i table, int64_t row) {
  const __m512i shift = _mm512_set_epi64(0x0008000800080008, 0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c,
                                         0, 0, 0x0004000400040004, 0x0004000400040004);
  const int64_t row_bytes = job.k / 2;
  const uint8_t* bytes = job.weight.packed + row * row_bytes;
  const int64_t distance = kRows * row_bytes < kBytesAhead ? kBytesAhead : kRows * row_bytes;
  const char* ahead = reinterpret_cast<const char*>(bytes) + distance;
  const int64_t blocks = job.k / job.weight.block_size;
  int chunk_to_block = 0;
  while (int64_t{64} << chunk_to_block < job.weight.block_size) {
    ++chunk_to_block;
  }
  __m512 total[size_t{kTokens}][size_t{kRows}];
  for (auto& token : total) {
    for (__m512& sum : token) {
      sum = _mm512_setzero_ps();
    }
  }
  const auto decode = [&](const uint8_t* p) {
    const __m512i quarters = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return std::bit_cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_srlv_epi16(quarters, shift), table));
  };
  const auto step = [&](int64_t chunk) {
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* from = bytes + r * row_bytes + chunk * 32;
      const __m512bh first = decode(from);
      const __m512bh second = decode(from + 16);
      const __m512 scale = _mm512_set1_ps(scales[r * blocks + (chunk >> chunk_to_block)]);
      for (int token = 0; token < kTokens; ++token) {
        const Bf16* values = x + token * job.k + chunk * 64;
        __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), first, Dot<Bf16>::load_operand(values));
        sum = _mm512_dpbf16_ps(sum, second, Dot<Bf16>::load_operand(values + 32));
        total[token][r] = _mm512_fmadd_ps(sum, scale, total[token][r]);
      }
    }
  };
  const int64_t chunks = job.k / 64;
  int64_t chunk = 0;
  for (; chunk + 2 <= chunks; chunk += 2, ahead += kRows * 64) {
    for (int line = 0; line < kRows; ++line) {
      _mm_prefetch(ahead + 64 * line, kLong ? _MM_HINT_T1 : _MM_HINT_T0);
    }
    step(chunk);
    step(chunk + 1);
  }
  if (chunk < chunks) {
    _mm_prefetch(ahead, kLong ? _MM_HINT_T1 : _MM_HINT_T0);
    step(chunk);
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int r = 0; r < kRows; ++r) {
      finish_output<Bf16>(job, token, row + r, _mm512_reduce_add_ps(total[token][r]));
    }
  }
}

inline bool goes_by_streams(const ProductJob& job) {
  const int64_t block_size = job.weight.block_size;
  return job.m <= kStreamTokens && block_size >= 64 && job.k % block_size == 0 && job.k / block_size <= kMaxRowBlocks;
}

// x [tokens, k] in the order of the decode.
void reorder_tokens(const ProductJob& job, void* reordered) {
  if (!goes_by_streams(job)) {
    return;
  }
  Bf16* out = static_cast<Bf16*>(reordered);
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                      2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  const Bf16* x = static_cast<const Bf16*>(job.x);
  for (int64_t i = 0; i < job.m * job.k; i += 32) {
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + i)));
  }
}

template <int kTokens, int kRows, bool kLong>
void dot_streams(const ProductJob& job, const Bf16* x, __m512i table, int64_t first, int64_t last) {
  static_assert(kStreamRows % kRows == 0);
  alignas(64) float scales[kScalesAtOnce];
  const ScaleDecoder decode_scales_of(job.weight);
  const int64_t blocks = job.k / job.weight.block_size;
  const int64_t rows_at_once = kScalesAtOnce / blocks / kRows * kRows;
  for (int64_t begin = first; begin < last; begin += rows_at_once) {
    const int64_t end = last - begin < rows_at_once ? last : begin + rows_at_once;
    decode_scales_of(begin * blocks, end * blocks, scales);
    for (int64_t row = begin; row < end; row += kRows) {
      dot_rows<kTokens, kRows, kLong>(job, x, scales + (row - begin) * blocks, table, row);
    }
  }
}

// The more x takes, the more rows share a load of it. Beside long rows, the first cache has no place for W's bytes too.
template <int kTokens>
void dot_tokens_by_streams(const ProductJob& job, const Bf16* x, __m512i table, int64_t first, int64_t last) {
  constexpr int64_t kLongRow = 4096;
  constexpr int kRows = kTokens <= 2 ? 2 : 4;
  (job.k <= kLongRow ? dot_streams<kTokens, kRows, false> : dot_streams<kTokens, 4, true>)(job, x, table, first, last);
}

// Rows [first, last) as far as they come in multiples of kStreamRows; returns the first row that is left.
int64_t linear_rows_by_streams(const ProductJob& job, int64_t first, int64_t last, const Bf16* x) {
  const __m256bh levels = _mm512_cvtneps_pbh(_mm512_loadu_ps(job.weight.levels));
  const __m512i table = _mm512_broadcast_i64x4(std::bit_cast<__m256i>(levels));
  const int64_t end = first + (last - first) / kStreamRows * kStreamRows;
  switch (job.m) {
    case 1:
      dot_tokens_by_streams<1>(job, x, table, first, end);
      break;
    case 2:
      dot_tokens_by_streams<2>(job, x, table, first, end);
      break;
    case 3:
      dot_tokens_by_streams<3>(job, x, table, first, end);
      break;
    default:
      dot_tokens_by_streams<4>(job, x, table, first, end);
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
