// Decoding of GGUF's blocks, a run of 32 elements at a time. Included by kernels-inl.h; the same rules hold.
//
// The codes of a run are unpacked to bytes, then widened.
#pragma once

#include "core/gguf.h"
#include "core/layout.h"
#include "core/weight_view.h"
#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int kRun = 32;

template <QuantType kType>
inline constexpr BlockFormat kBlockFormat = kBlockFormats[static_cast<int>(kType)];

template <QuantType kType>
inline constexpr unsigned kRunsOfBlock = kBlockFormat<kType>.elements / kRun;

// A run of a flattened weight: its block, and which of the block's it is.
struct RunPlace {
  const uint8_t* block;
  unsigned run;
};

template <QuantType kType>
inline RunPlace run_at(const uint8_t* packed, int64_t element) {
  constexpr BlockFormat kFormat = kBlockFormat<kType>;
  const auto at = static_cast<uint64_t>(element);
  return {packed + at / kFormat.elements * kFormat.bytes, static_cast<unsigned>(at % kFormat.elements) / kRun};
}

// ---------------------------------------------------------------------------------------------------------------------
// Codes

// Vectors that every compiler of this library knows; Bytes16 is vec.h's.
using Bytes32 = uint8_t __attribute__((vector_size(32)));
using Words32 = uint16_t __attribute__((vector_size(32)));

template <typename Vector>
inline void load_vector(const void* p, Vector& v) {
  std::memcpy(&v, p, sizeof v);
}

// The codes of a run, in halves.
struct RunCodes {
  Bytes16 half[2];

  void split(const Bytes32& codes) {
    half[0] = __builtin_shufflevector(codes, codes, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    half[1] = __builtin_shufflevector(codes, codes, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  }

  // 16 bytes: the low nibbles, then the high ones.
  void set_nibbles(const uint8_t* bytes) {
    Bytes16 both;
    load_vector(bytes, both);
    half[0] = both & 15;
    half[1] = both >> 4;
  }

  // Bit 4 of each code, from a bit of each in four bytes.
  void add_fifth_bits(const uint8_t* bits) {
    const Bytes16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    Bytes16 four = {};
    std::memcpy(&four, bits, 4);
    const Bytes16 first = __builtin_shufflevector(four, four, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const Bytes16 second = __builtin_shufflevector(four, four, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    half[0] |= static_cast<Bytes16>((first & bit) == bit) & 16;
    half[1] |= static_cast<Bytes16>((second & bit) == bit) & 16;
  }

  void subtract(uint8_t offset) {
    half[0] -= offset;
    half[1] -= offset;
  }
};

// `kMask` of 32 bytes after a shift, which takes no more of the byte above than the mask leaves out.
template <uint8_t kMask>
inline void bits_of_32(const uint8_t* bytes, unsigned shift, Bytes32& codes) {
  Words32 words;
  load_vector(bytes, words);
  words >>= static_cast<uint16_t>(shift);
  std::memcpy(&codes, &words, sizeof codes);
  codes &= kMask;
}

template <QuantType kType>
inline void unpack_run(const RunPlace& at, RunCodes& codes) {
  const auto [block, run] = at;
  [[maybe_unused]] Bytes32 low;
  [[maybe_unused]] Bytes32 high;
  if constexpr (kType == QuantType::kQ4_0) {
    codes.set_nibbles(block + 2);
    codes.subtract(8);
  } else if constexpr (kType == QuantType::kQ4_1) {
    codes.set_nibbles(block + 4);
  } else if constexpr (kType == QuantType::kQ5_0) {
    codes.set_nibbles(block + 6);
    codes.add_fifth_bits(block + 2);
    codes.subtract(16);
  } else if constexpr (kType == QuantType::kQ5_1) {
    codes.set_nibbles(block + 8);
    codes.add_fifth_bits(block + 4);
  } else if constexpr (kType == QuantType::kQ8_0) {
    load_vector(block + 2, codes.half[0]);
    load_vector(block + 18, codes.half[1]);
  } else if constexpr (kType == QuantType::kQ4_K) {
    bits_of_32<15>(block + 16 + run / 2 * kRun, run % 2 * 4, low);
    codes.split(low);
  } else if constexpr (kType == QuantType::kQ5_K) {
    bits_of_32<15>(block + 48 + run / 2 * kRun, run % 2 * 4, low);
    bits_of_32<1>(block + 16, run, high);
    codes.split(low | high << 4);
  } else if constexpr (kType == QuantType::kQ6_K) {
    bits_of_32<15>(block + run / 4 * 64 + run % 2 * kRun, run % 4 / 2 * 4, low);
    bits_of_32<3>(block + 128 + run / 4 * kRun, run % 4 * 2, high);
    codes.split((low | high << 4) - 32);
  } else {
    codes.set_nibbles(block + 2);
    codes.half[0] = look_up_16(iq4_nl_levels().value, codes.half[0]);
    codes.half[1] = look_up_16(iq4_nl_levels().value, codes.half[1]);
  }
}

// use(i, codes) for elements [i, i + kLanes) of 16, from kFirst on.
template <int kFirst, typename Use>
inline void each_of_16(Bytes16 codes, const Use& use) {
  use(kFirst, widened<kFirst>(codes));
  if constexpr (kFirst + kLanes < 16) {
    each_of_16<kFirst + kLanes>(codes, use);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Scales and values

// The scales of a block. A NaN is the canonical one, which rounding by integer arithmetic keeps.
template <QuantType kType>
class BlockScales {
 public:
  explicit BlockScales(const uint8_t* block)
      : factor_(canonical_half(block + (kType == QuantType::kQ6_K ? 208 : 0))),
        addend_(Gguf<kType>::kAdds ? canonical_half(block + 2) : 0.0f) {
    if constexpr (kHasMinimaOfRuns) {  // Gguf<kType>::scale of all runs at once
      const auto word = [&](int at) {
        uint32_t bits = 0;
        std::memcpy(&bits, block + at, sizeof bits);
        return bits;
      };
      const uint32_t low[2] = {word(4), word(8)};
      const uint32_t top = word(12);
      const uint32_t codes[4] = {low[0] & 0x3f3f3f3fu, (top & 0x0f0f0f0fu) | (low[0] >> 2 & 0x30303030u),
                                 low[1] & 0x3f3f3f3fu, (top >> 4 & 0x0f0f0f0fu) | (low[1] >> 2 & 0x30303030u)};
      set_steps(codes);
      addend_ = -addend_;
    } else if constexpr (kType == QuantType::kQ6_K) {
      set_steps(block + 192);
    }
  }

  // Of elements [16 half, 16 half + 16).
  GgufScale at(unsigned half) const {
    if constexpr (kHasMinimaOfRuns) {
      return {factor_ * steps_[half / 2], addend_ * steps_[8 + half / 2]};
    } else if constexpr (kType == QuantType::kQ6_K) {
      return {factor_ * steps_[half], 0.0f};
    } else {
      return {factor_, addend_};
    }
  }

 private:
  static constexpr bool kHasMinimaOfRuns = kType == QuantType::kQ4_K || kType == QuantType::kQ5_K;

  static float canonical_half(const uint8_t* p) {
    const float value = load_half(p);
    return value != value ? std::bit_cast<float>(0x7fc00000u) : value;
  }
  void set_steps(const void* codes) {
    Bytes16 bytes;
    load_vector(codes, bytes);
    each_of_16<0>(bytes, [&](int i, Floats values) { store(steps_ + i, values); });
  }

  float factor_;
  float addend_;
  alignas(64) float steps_[kBlockFormat<kType>.elements == 256 ? 16 : 1];  // that multiply them
};

// use(i, codes, scale) for elements [i, i + kLanes) of the run, in order.
template <QuantType kType, typename Use>
inline void each_of_run(const RunPlace& at, const BlockScales<kType>& scales, const Use& use) {
  RunCodes codes;
  unpack_run<kType>(at, codes);
  const GgufScale first = scales.at(2 * at.run);
  const GgufScale second = kType == QuantType::kQ6_K ? scales.at(2 * at.run + 1) : first;
  each_of_16<0>(codes.half[0], [&](int i, Floats values) { use(i, values, first); });
  each_of_16<0>(codes.half[1], [&](int i, Floats values) { use(16 + i, values, second); });
}

// use(at, scales) for `runs` runs from an element on, where a run begins.
template <QuantType kType, typename Use>
inline void each_run(const uint8_t* packed, int64_t element, int64_t runs, const Use& use) {
  while (runs > 0) {
    RunPlace at = run_at<kType>(packed, element);
    const BlockScales<kType> scales(at.block);
    for (; runs > 0 && at.run < kRunsOfBlock<kType>; ++at.run, --runs, element += kRun) {
      use(at, scales);
    }
  }
}

// The runs in fp32, by the exact rule.
template <QuantType kType>
void decode_runs(const uint8_t* packed, int64_t element, int64_t runs, float* out) {
  each_run<kType>(packed, element, runs, [&](const RunPlace& at, const BlockScales<kType>& scales) {
    each_of_run<kType>(at, scales, [&](int i, Floats codes, const GgufScale& scale) {
      const Floats product = multiply(codes, all(scale.factor));
      store(out + i, Gguf<kType>::kAdds ? add(product, all(scale.addend)) : product);
    });
    out += kRun;
  });
}

template <typename Out>
using DecodeRuns = void (*)(const uint8_t* packed, int64_t element, int64_t runs, Out* out);

inline DecodeRuns<float> run_decoder(QuantType type) {
  return with_gguf(type, []<QuantType kType>() -> DecodeRuns<float> { return decode_runs<kType>; });
}

#if defined(__AVX512BF16__)
// The same for products, whose sums round as well: product and addend are one operation, rounded to bf16.
template <QuantType kType>
void decode_runs_to_bf16(const uint8_t* packed, int64_t element, int64_t runs, Bf16* out) {
  each_run<kType>(packed, element, runs, [&](const RunPlace& at, const BlockScales<kType>& scales) {
    Floats half[2];
    each_of_run<kType>(at, scales, [&](int i, Floats codes, const GgufScale& scale) {
      const Floats factor = all(scale.factor);
      half[i / kLanes] = Gguf<kType>::kAdds ? multiply_add(codes, factor, all(scale.addend)) : multiply(codes, factor);
    });
    _mm512_storeu_si512(out, std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(half[1], half[0])));
    out += kRun;
  });
}

inline DecodeRuns<Bf16> run_decoder_to_bf16(QuantType type) {
  return with_gguf(type, []<QuantType kType>() -> DecodeRuns<Bf16> { return decode_runs_to_bf16<kType>; });
}
#endif

// Elements [begin, end) of the flattened weight.
template <typename T>
void gguf_span(const WeightView& weight, int64_t begin, int64_t end, T* out) {
  constexpr int64_t kAtOnce = 256;
  alignas(64) float values[kAtOnce];
  const DecodeRuns<float> decode = run_decoder(weight.type);
  while (begin < end) {
    const int64_t first = begin / kRun * kRun;
    const int64_t stop = first + kAtOnce < end ? first + kAtOnce : end;
    decode(weight.packed, first, ceil_div(stop - first, kRun), values);
    int64_t i = begin - first;
    for (; i + kLanes <= stop - first; i += kLanes, out += kLanes) {
      store_as(out, load(values + i));
    }
    for (; i < stop - first; ++i) {
      *out++ = from_float<T>(values[i]);
    }
    begin = stop;
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
