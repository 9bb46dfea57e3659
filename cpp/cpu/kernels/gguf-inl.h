// Decoding of GGUF's blocks, a run of 32 elements at a time. Included by kernels/all-inl.h; the same rules hold.
//
// The codes of a run are unpacked to bytes, then widened.
#pragma once

#include "core/gguf.h"
#include "core/layout.h"
#include "core/weight_view.h"
#include "cpu/isa/vec.h"

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
using Halves32 = uint16_t __attribute__((vector_size(32)));
using Words32 = uint32_t __attribute__((vector_size(32)));
using Words16 = uint32_t __attribute__((vector_size(16)));

template <typename Vector>
inline void load_vector(const void* p, Vector& v) {
  std::memcpy(&v, p, sizeof v);
}

// The codes of a run, signed: in halves and whole, of which a caller takes the one and the compiler drops the other.
struct RunCodes {
  Bytes16 half[2];
  Bytes32 all;

  void set_all(const Bytes32& codes) {
    all = codes;
    half[0] = __builtin_shufflevector(codes, codes, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    half[1] = __builtin_shufflevector(codes, codes, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  void set_halves(Bytes16 first, Bytes16 second) {
    half[0] = first;
    half[1] = second;
    all = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
                                  20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  }

  // 16 bytes: the low nibbles, then the high ones.
  void set_nibbles(const uint8_t* bytes) {
    Bytes16 both;
    load_vector(bytes, both);
    set_halves(both & 15, both >> 4);
  }

  // Bit 4 of each code, from a bit of each in four bytes.
  void add_fifth_bits(const uint8_t* bits) {
    uint32_t word = 0;
    std::memcpy(&word, bits, sizeof word);
    RunCodes fifth;
#if defined(__AVX512BW__)
    const Bytes32 sixteens = Bytes32{} + 16;
    fifth.set_all(Bytes32(_mm256_maskz_loadu_epi8(word, &sixteens)));
#else
    const auto bytes = Bytes32(Words32{} + word);
    const auto bit = Bytes32(
        Words32{0x08040201, 0x80402010, 0x08040201, 0x80402010, 0x08040201, 0x80402010, 0x08040201, 0x80402010});
    const Bytes32 spread = __builtin_shufflevector(bytes, bytes, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18,
                                                   18, 18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
    fifth.set_all(Bytes32((spread & bit) == bit) & 16);
#endif
    half[0] |= fifth.half[0];
    half[1] |= fifth.half[1];
    all |= fifth.all;
  }

  void subtract(uint8_t offset) {
    half[0] -= offset;
    half[1] -= offset;
    all -= offset;
  }
};

// `kMask` of 32 bytes after a shift, which takes no more of the byte above than the mask leaves out.
template <uint8_t kMask>
inline void bits_of_32(const uint8_t* bytes, unsigned shift, Halves32& halves) {
  load_vector(bytes, halves);
  halves >>= static_cast<uint16_t>(shift);
  halves &= uint16_t{kMask * 0x101};
}

template <QuantType kType>
inline void unpack_run(const RunPlace& at, RunCodes& codes) {
  const auto [block, run] = at;
  [[maybe_unused]] Halves32 low;
  [[maybe_unused]] Halves32 high;
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
    load_vector(block + 2, codes.all);
    load_vector(block + 2, codes.half[0]);
    load_vector(block + 18, codes.half[1]);
  } else if constexpr (kType == QuantType::kQ4_K) {
    bits_of_32<15>(block + 16 + run / 2 * kRun, run % 2 * 4, low);
    codes.set_all(Bytes32(low));
  } else if constexpr (kType == QuantType::kQ5_K) {
    bits_of_32<15>(block + 48 + run / 2 * kRun, run % 2 * 4, low);
    bits_of_32<1>(block + 16, run, high);
    codes.set_all(Bytes32(low | high << 4));
  } else if constexpr (kType == QuantType::kQ6_K) {
    bits_of_32<15>(block + run / 4 * 64 + run % 2 * kRun, run % 4 / 2 * 4, low);
    bits_of_32<3>(block + 128 + run / 4 * kRun, run % 4 * 2, high);
    codes.set_all(Bytes32(low | high << 4) - 32);
  } else {
    static_assert(has_levels(kType));
    static constexpr CodeLevels kLevels = code_levels(kType);
    codes.set_nibbles(block + kBlockFormat<kType>.bytes - 16);
    codes.set_halves(look_up_16(kLevels.value, codes.half[0]), look_up_16(kLevels.value, codes.half[1]));
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
      : BlockScales(block,
                    kType == QuantType::kMxfp4 ? half_power_of_two(block[0])
                                               : canonical_half(block + (kType == QuantType::kQ6_K ? 208 : 0)),
                    Gguf<kType>::kAdds ? canonical_half(block + 2) : 0.0f) {}

  // By halves that were read before.
  BlockScales(const uint8_t* block, float factor, float addend) {
    if constexpr (kBlockFormat<kType>.elements == kRun) {
      factors_[0] = factor;
      addends_[0] = addend;
    } else {
      Bytes16 steps;  // that multiply them
      load_vector(block + (kType == QuantType::kQ6_K ? 192 : 0), steps);
      if constexpr (Gguf<kType>::kAdds) {
        set_steps_and_minima(steps);
      }
      each_of_16<0>(steps, [&](int i, Floats values) {
        store(factors_ + i, multiply(values, all(factor)));
        if constexpr (Gguf<kType>::kAdds) {
          store(addends_ + i, multiply(values, all(-addend)));
        }
      });
    }
  }

  // Of elements [16 half, 16 half + 16).
  GgufScale at(unsigned half) const {
    if constexpr (kBlockFormat<kType>.elements == kRun) {
      return {factors_[0], addends_[0]};
    } else if constexpr (Gguf<kType>::kAdds) {
      return {factors_[half / 2], addends_[kFirstMinimum + half / 2]};
    } else {
      return {factors_[half], 0.0f};
    }
  }

 private:
  static constexpr int kSteps = kBlockFormat<kType>.elements == kRun ? 1 : 16;
  static constexpr unsigned kFirstMinimum = 8;

  static float canonical_half(const uint8_t* p) {
    const float value = load_half(p);
#if defined(__AVX512BF16__)
    return value;  // the CPU rounds
#else
    return value != value ? std::bit_cast<float>(0x7fc00000u) : value;
#endif
  }
  // Gguf<kType>::scale of all runs at once, from the first 16 bytes of a block: 8 scales and then 8 minima.
  static void set_steps_and_minima(Bytes16& steps) {
    const auto words = Words16(steps);
    const Words16 low = __builtin_shufflevector(words, words, 1, 3, 2, 3) >> Words16{0, 0, 0, 4};
    const Words16 high = __builtin_shufflevector(words, words, 1, 1, 1, 2) >> 2;
    steps = Bytes16((low & Words16{0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f}) |
                    (high & Words16{0, 0x30303030, 0, 0x30303030}));
  }

  alignas(64) float factors_[size_t{kSteps}];
  alignas(64) float addends_[size_t{kSteps}];
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

// Whether rows of k elements are whole blocks, so that a column has the same place in each.
template <QuantType kType>
inline bool has_whole_rows(int64_t k) {
  return k % kBlockFormat<kType>.elements == 0;
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

// Codes of elements with one scale to values, by the exact rule.
template <QuantType kType>
inline Floats exact_values(Floats codes, const GgufScale& scale) {
  const Floats product = multiply(codes, all(scale.factor));
  return Gguf<kType>::kAdds ? add(product, all(scale.addend)) : product;
}

// The runs in fp32.
template <QuantType kType>
void decode_runs(const uint8_t* packed, int64_t element, int64_t runs, float* out) {
  each_run<kType>(packed, element, runs, [&](const RunPlace& at, const BlockScales<kType>& scales) {
    each_of_run<kType>(at, scales, [&](int i, Floats codes, const GgufScale& scale) {
      store(out + i, exact_values<kType>(codes, scale));
    });
    out += kRun;
  });
}

using DecodeRuns = void (*)(const uint8_t* packed, int64_t element, int64_t runs, float* out);

inline DecodeRuns run_decoder(QuantType type) {
  return with_gguf(type, []<QuantType kType>() -> DecodeRuns { return decode_runs<kType>; });
}

// Elements [begin, end) of the flattened weight.
template <typename T>
void gguf_span(const WeightView& weight, int64_t begin, int64_t end, T* out) {
  constexpr int64_t kAtOnce = 256;
  alignas(64) float values[kAtOnce];
  const DecodeRuns decode = run_decoder(weight.type);
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
