// Every CPU kernel, once. Each isa_*.cc names a namespace and includes this with its own compiler flags.
//
// No standard-library templates in here: an instantiation compiled for AVX-512 could be the one the linker keeps.
#include "core/layout.h"
#include "cpu/kernels-dequantize-inl.h"
#include "cpu/kernels-quantize-inl.h"
#include "cpu/kernels-scales-inl.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk =
    2048;                 // elements of a row of W decoded at a time: four KiB of bf16, beside x in the first cache
constexpr int kRows = 2;  // rows of W that share each load of x

// sums[i][r] += x[i, 0:count] . w[r, 0:count] for kTokens rows of x.
template <typename T, int kTokens>
void dot_block(const T* x, int64_t x_stride, const T* w, int64_t count, float (*sums)[kRows]) {
  using D = Dot<T>;
  constexpr int kUnroll = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;  // enough independent sums to hide their latency
  Floats partial[size_t{kTokens}][size_t{kRows}][size_t{kUnroll}];
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
      const auto second = D::load_operand(w + kChunk + at);
      for (int token = 0; token < kTokens; ++token) {
        const auto value = D::load_operand(x + token * x_stride + at);
        partial[token][0][u] = D::step(value, first, partial[token][0][u]);
        partial[token][1][u] = D::step(value, second, partial[token][1][u]);
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int row = 0; row < kRows; ++row) {
      float sum = 0.0f;
      for (int u = 0; u < kUnroll; ++u) {
        sum += total(partial[token][row][u]);
      }
      for (int64_t j = i; j < count; ++j) {
        sum += to_float(x[token * x_stride + j]) * to_float(w[row * kChunk + j]);
      }
      sums[token][row] += sum;
    }
  }
}

template <typename T>
void dot_tokens(const T* x, int64_t tokens, int64_t x_stride, const T* w, int64_t count, float (*sums)[kRows]) {
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
void linear_rows(const LinearJob& job, int64_t first, int64_t last) {
  alignas(64) T w[kRows * kChunk];
  float sums[kMaxTokens][kRows];
  const T* x = static_cast<const T*>(job.x);
  const T* bias = static_cast<const T*>(job.bias);
  T* y = static_cast<T*>(job.y);
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t rows = last - row < kRows ? last - row : kRows;
    std::memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < job.k; k += kChunk) {
      const int64_t count = job.k - k < kChunk ? job.k - k : kChunk;
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t begin = (row + (r < rows ? r : 0)) * job.k + k;  // a missing second row repeats the first
        dequantize_span<T>(job.weight, begin, begin + count, w + r * kChunk);
      }
      dot_tokens(x + k, job.m, job.k, w, count, sums);
    }
    for (int64_t token = 0; token < job.m; ++token) {
      for (int64_t r = 0; r < rows; ++r) {
        const float sum = sums[token][r] + (bias == nullptr ? 0.0f : to_float(bias[row + r]));
        y[token * job.n + row + r] = from_float<T>(sum);
      }
    }
  }
}

constexpr Kernels kTable = {
    {quantize_blocks<float>, quantize_blocks<Bf16>, quantize_blocks<Fp16>},
    {dequantize_span<float>, dequantize_span<Bf16>, dequantize_span<Fp16>},
    sum_groups,
    quantize_scale_groups,
    decode_scales,
    {linear_rows<float>, linear_rows<Bf16>, linear_rows<Fp16>},
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
