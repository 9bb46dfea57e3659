// Every CPU kernel, once. Each isa_*.cc names a namespace and includes this with its own compiler flags.
//
// No standard-library templates in here: an instantiation compiled for AVX-512 could be the one the linker keeps.
#include "core/layout.h"
#include "cpu/kernels-activations-inl.h"
#include "cpu/kernels-attention-inl.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Widens one block to fp32, padded with zeros to whole vectors, and returns the bits of its largest magnitude.
template <typename T>
uint32_t widen(const T* x, int64_t count, float* values) {
  MagnitudeMax highest;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats v = load(x + i);
    highest.update(v);
    store(values + i, v);
  }
  if (i < count) {
    for (int64_t j = i; j < i + kLanes; ++j) {
      values[j] = j < count ? to_float(x[j]) : 0.0f;
    }
    highest.update(load(values + i));
  }
  return highest.reduce();
}

void pack_codes(const uint8_t* codes, int64_t count, uint8_t missing, uint8_t* packed) {
  const int64_t pairs = count / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    packed[i] = pack_nibbles(codes[2 * i], codes[2 * i + 1]);
  }
  if (count % 2 == 1) {
    packed[pairs] = pack_nibbles(codes[count - 1], missing);
  }
}

void encode(const float* values, int64_t count, const Normaliser& by, QuantType type, uint8_t* codes) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats v = normalise(load(values + i), by);
    if (type == QuantType::kNf4) {
      nf4_codes(v, codes + i);
    } else {
      fp4_codes(v, codes + i);
    }
  }
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

int64_t first_non_finite(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if ((std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu) >= kInfinityBits) {
      return i;
    }
  }
  return -1;
}

template <typename T>
int64_t quantize_blocks(const BlockJob& job, int64_t first, int64_t last) {
  alignas(64) float values[kMaxBlock];
  alignas(64) uint8_t codes[kMaxBlock];
  const T* x = static_cast<const T*>(job.x);
  const uint8_t zero = zero_code(job.type);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.block_size;
    const int64_t left = job.numel - begin;
    const int64_t count = left < job.block_size ? left : job.block_size;
    const uint32_t bits = widen(x + begin, count, values);
    if (bits >= kInfinityBits) {
      return begin + first_non_finite(values, count);
    }
    const float absmax = std::bit_cast<float>(bits);
    job.absmax[block] = absmax;
    uint8_t* packed = job.packed + begin / 2;
    if (bits == 0) {
      std::memset(packed, pack_nibbles(zero, zero), static_cast<size_t>(packed_bytes(count)));
      continue;
    }
    encode(values, count, normaliser_of(absmax), job.type, codes);
    pack_codes(codes, count, zero, packed);
  }
  return -1;
}

// Elements [begin, end) of one block, which all share `decode`.
template <typename T>
void decode_run(const Decoder<T>& decode, const WeightView& weight, float scale, int64_t begin, int64_t end, T* out) {
  const auto single = [&](int64_t element) { return from_float<T>(weight.levels[weight.code(element)] * scale); };
  if (begin < end && begin % 2 == 1) {
    *out++ = single(begin++);
  }
  constexpr int64_t kStep = 2 * Decoder<T>::kBytes;
  const uint8_t* bytes = weight.packed + begin / 2;
  for (; begin + kStep <= end; begin += kStep, bytes += Decoder<T>::kBytes, out += kStep) {
    decode.step(bytes, out);
  }
  for (; begin < end; ++begin) {
    *out++ = single(begin);
  }
}

template <typename T>
void dequantize_span(const WeightView& weight, int64_t begin, int64_t end, void* target) {
  T* out = static_cast<T*>(target);
  for (int64_t block = begin / weight.block_size; begin < end; ++block) {
    const int64_t block_end = (block + 1) * weight.block_size;
    const int64_t run_end = block_end < end ? block_end : end;
    const float scale = weight.scale(block);
    const Decoder<T> decode(weight.levels, scale);
    decode_run(decode, weight, scale, begin, run_end, out);
    out += run_end - begin;
    begin = run_end;
  }
}

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
    {linear_rows<float>, linear_rows<Bf16>, linear_rows<Fp16>},
    kActivations,
    kAttention,
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
