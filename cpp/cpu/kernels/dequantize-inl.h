// Decoding runs of elements. Included by kernels/all-inl.h; the same rules hold.
#pragma once

#include "core/layout.h"
#include "cpu/isa/vec.h"
#include "cpu/kernels/gguf-inl.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/scales-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Elements [begin, end) of one block, which all share `decode`.
template <bool kStream, typename T>
void decode_run(const Decoder<T>& decode, const WeightView& weight, float scale, int64_t begin, int64_t end, T* out) {
  const auto single = [&](int64_t element) { return from_float<T>(weight.levels[weight.code(element)] * scale); };
  if (begin < end && begin % 2 == 1) {
    *out++ = single(begin++);
  }
  constexpr int64_t kStep = 2 * Decoder<T>::kBytes;
  const uint8_t* bytes = weight.packed + begin / 2;
  for (; begin + kStep <= end; begin += kStep, bytes += Decoder<T>::kBytes, out += kStep) {
    decode.template step<kStream>(bytes, out);
  }
  for (; begin < end; ++begin) {
    *out++ = single(begin);
  }
}

// `count` blocks from element `begin` on, where a block begins.
template <bool kStream, typename T>
int64_t decode_whole_blocks(const WeightView& weight, const float* scales, int64_t begin, int64_t count, T* out) {
  constexpr int64_t kStep = 2 * Decoder<T>::kBytes;
  const uint8_t* bytes = weight.packed + begin / 2;
  for (int64_t i = 0; i < count; ++i) {
    const Decoder<T> decode(weight.levels, scales[i]);
    for (int64_t j = 0; j < weight.block_size; j += kStep, bytes += Decoder<T>::kBytes, out += kStep) {
      decode.template step<kStream>(bytes, out);
    }
  }
  return count;
}

template <bool kStream, typename T>
void decode_blocks(const WeightView& weight, int64_t begin, int64_t end, T* out) {
  constexpr int64_t kScales = 64;  // decoded at a time
  alignas(64) float buffer[kScales];
  const int64_t last = ceil_div(end, weight.block_size);
  for (int64_t block = begin / weight.block_size; block < last; block += kScales) {
    const int64_t count = last - block < kScales ? last - block : kScales;
    const float* scales = buffer;
    if (weight.absmax != nullptr) {
      scales = weight.absmax + block;
    } else {
      decode_scales(weight, block, block + count, buffer);
    }
    int64_t i = 0;
    if (begin == block * weight.block_size) {
      const int64_t fitting = (end - begin) / weight.block_size;
      const int64_t whole = count < fitting ? count : fitting;
      i = decode_whole_blocks<kStream>(weight, scales, begin, whole, out);
      begin += i * weight.block_size;
      out += i * weight.block_size;
    }
    for (; i < count; ++i) {
      const int64_t block_end = (block + i + 1) * weight.block_size;
      const int64_t run_end = block_end < end ? block_end : end;
      const Decoder<T> decode(weight.levels, scales[i]);
      decode_run<kStream>(decode, weight, scales[i], begin, run_end, out);
      out += run_end - begin;
      begin = run_end;
    }
  }
}

// Elements [begin, end) of the flattened weight. The streaming stores go past the caches; they need whole steps.
template <typename T>
void dequantize_span(const WeightView& weight, int64_t begin, int64_t end, void* target, bool stream = false) {
  T* out = static_cast<T*>(target);
  if (is_gguf(weight.type)) {
    gguf_span(weight, begin, end, out);
    return;
  }
#if defined(__AVX2__)
  if (stream && begin % kMinBlock == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    decode_blocks<true>(weight, begin, end, out);
    _mm_sfence();
    return;
  }
#else
  (void)stream;
#endif
  decode_blocks<false>(weight, begin, end, out);
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
