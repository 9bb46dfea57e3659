// Forward products with so few tokens that the weight's bytes are the work: rows of W are decoded in registers or in
// the first cache, once for all tokens.
#include "cpu/kernels/rows-gguf-inl.h"
#include "cpu/kernels/streams-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

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
void linear_rows_by_table(const RowsJob& rows_job, int64_t first, int64_t last) {
  const ProductJob& job = rows_job.product;
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
        finish_output<T>(rows_job, token, row + r, sums[token][r]);
      }
    }
  }
}

template <typename T>
void linear_rows(const RowsJob& job, int64_t first, int64_t last) {
  if (goes_by_runs(job.product)) {
    linear_rows_by_runs<T>(job, first, last);
    return;
  }
  if (goes_by_streams(job.product)) {
    first = linear_rows_by_streams<T>(job, first, last);
  }
  linear_rows_by_table<T>(job, first, last);
}

template <typename T>
constexpr RowKernels kRows = {kMaxTokens, stream_scratch_bytes<T>, reorder_tokens<T>, linear_rows<T>};
#if defined(__AVX512BF16__)
template <>
constexpr RowKernels kRows<Bf16> = {kTokensAtOnce, stream_scratch_bytes<Bf16>, reorder_tokens<Bf16>, linear_rows<Bf16>};
#endif

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
