// Every CPU kernel, once. Each isa_*.cc names a namespace and includes this with its own compiler flags.
//
// No standard-library templates in here: an instantiation compiled for AVX-512 could be the one the linker keeps.
#include "core/layout.h"
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

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE

#include "cpu/kernels-gemm-inl.h"
#include "cpu/kernels-linear-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr Kernels kTable = {
    {quantize_blocks<float>, quantize_blocks<Bf16>, quantize_blocks<Fp16>},
    {dequantize_span<float>, dequantize_span<Bf16>, dequantize_span<Fp16>},
    {linear_rows<float>, linear_rows<Bf16>, linear_rows<Fp16>},
    {nullptr, kReorderTokens, nullptr},
    {product_columns<float, Forward<float>>, product_columns<Bf16, Forward<Bf16>>,
     product_columns<Fp16, Forward<Fp16>>},
    {product_columns<float, GradInput<float>>, product_columns<Bf16, GradInput<Bf16>>,
     product_columns<Fp16, GradInput<Fp16>>},
    columns_scratch_bytes,
    nullptr,
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
