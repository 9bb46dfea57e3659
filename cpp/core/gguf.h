// The block formats of GGUF files: their sizes, and the value of one element. The only home of both.
//
// A tensor is a row of blocks, each with its scales and its codes, and blocks run over the flattened tensor. An element
// is code * factor, or code * factor + addend, in fp32 with every operation rounded, as the `gguf` Python package has
// it (gguf/quants.py; the layouts are those of ggml-common.h). Kernels of vectors and of GPUs must give these bits.
#pragma once

#include <cstdint>

#include "core/arithmetic.h"
#include "core/codebook.h"
#include "core/half.h"
#include "core/layout.h"

namespace qlora_native {

struct BlockFormat {
  const char* name;
  int elements;  // of a block; 0 for nf4 and fp4, whose scales lie apart from the codes
  int bytes;
};

inline constexpr int kQuantTypes = 12;  // CONTRIBUTING.md, "Where to add", says where a new one goes

// By QuantType.
inline constexpr BlockFormat kBlockFormats[kQuantTypes] = {{"nf4", 0, 0},      {"fp4", 0, 0},      {"q4_0", 32, 18},
                                                           {"q4_1", 32, 20},   {"q5_0", 32, 22},   {"q5_1", 32, 24},
                                                           {"q8_0", 32, 34},   {"q4_k", 256, 144}, {"q5_k", 256, 176},
                                                           {"q6_k", 256, 210}, {"iq4_nl", 32, 18}, {"mxfp4", 32, 17}};

QLORA_NATIVE_HD constexpr bool is_gguf(QuantType type) { return type >= QuantType::kQ4_0; }

// The levels of a format whose levels are not whole numbers one apart, by code.
struct CodeLevels {
  int8_t value[16];
};

QLORA_NATIVE_HD constexpr bool has_levels(QuantType type) {
  return type == QuantType::kIq4Nl || type == QuantType::kMxfp4;
}

// MXFP4's are those of FP4 (sign, two bits of exponent, one of mantissa) times two; its zeros of both signs are +0.
constexpr CodeLevels code_levels(QuantType type) {
  return type == QuantType::kMxfp4
             ? CodeLevels{{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}}
             : CodeLevels{{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};
}

// Of 16 neighboring elements.
struct GgufScale {
  float factor;
  float addend;  // 0 for the formats without minima
};

// Blocks start at any byte.
QLORA_NATIVE_HD float half_at(const uint8_t* p) { return to_float(Fp16{static_cast<uint16_t>(p[0] | p[1] << 8)}); }

// Half of the power of two that MXFP4's byte of exponent (E8M0, with a bias of 127) stands for: levels are twice the
// values of FP4. 0 and 1 give subnormal numbers; ggml has 2^127 in place of NaN for 255.
QLORA_NATIVE_HD float half_power_of_two(uint8_t exponent) {
  return std::bit_cast<float>(exponent < 2 ? 0x00200000u << exponent : (exponent - 1u) << 23);
}

// Element i of 16 bytes: the low nibbles come first.
QLORA_NATIVE_HD int nibble_of_32(const uint8_t* bytes, int i) { return bytes[i % 16] >> (i / 16 * 4) & 15; }

// Element i of a block of 256 in rows of 32 bytes, each 32 low nibbles and then 32 high ones.
QLORA_NATIVE_HD int nibble_of_256(const uint8_t* bytes, int i) {
  return bytes[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
}

// Formats take a function that reads a half, for devices that do so by one instruction.
struct OneScale {
  static constexpr bool kAdds = false;  // whether there is an addend
  template <auto kHalf = half_at>
  QLORA_NATIVE_HD static GgufScale scale(const uint8_t* block, int) {
    return {kHalf(block), 0.0f};
  }
};

struct ScaleAndMinimum {
  static constexpr bool kAdds = true;
  template <auto kHalf = half_at>
  QLORA_NATIVE_HD static GgufScale scale(const uint8_t* block, int) {
    return {kHalf(block), kHalf(block + 2)};
  }
};

// Six bits a scale and six bits a minimum of each 32 elements, in 12 bytes.
struct ScaledScales {
  static constexpr bool kAdds = true;
  template <auto kHalf = half_at>
  QLORA_NATIVE_HD static GgufScale scale(const uint8_t* block, int element) {
    const uint8_t* packed = block + 4 + (element >> 5 & 3);
    const int of_scale = packed[0], of_minimum = packed[4], of_both = packed[8];
    const int scale = element < 128 ? of_scale & 63 : (of_both & 15) | (of_scale >> 2 & 48);
    const int minimum = element < 128 ? of_minimum & 63 : of_both >> 4 | (of_minimum >> 2 & 48);
    return {kHalf(block) * static_cast<float>(scale), -(kHalf(block + 2) * static_cast<float>(minimum))};
  }
};

// How elements lie in a block: scale(block, element) is that of elements 16 i to 16 i + 15.
template <QuantType kType>
struct Gguf;

template <>
struct Gguf<QuantType::kQ4_0> : OneScale {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) { return nibble_of_32(block + 2, i) - 8; }
};

template <>
struct Gguf<QuantType::kQ4_1> : ScaleAndMinimum {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) { return nibble_of_32(block + 4, i); }
};

template <>
struct Gguf<QuantType::kQ5_0> : OneScale {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) {
    return (nibble_of_32(block + 6, i) | (block[2 + i / 8] >> i % 8 & 1) << 4) - 16;
  }
};

template <>
struct Gguf<QuantType::kQ5_1> : ScaleAndMinimum {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) {
    return nibble_of_32(block + 8, i) | (block[4 + i / 8] >> i % 8 & 1) << 4;
  }
};

template <>
struct Gguf<QuantType::kQ8_0> : OneScale {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) { return static_cast<int8_t>(block[2 + i]); }
};

template <>
struct Gguf<QuantType::kQ4_K> : ScaledScales {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) { return nibble_of_256(block + 16, i); }
};

template <>
struct Gguf<QuantType::kQ5_K> : ScaledScales {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) {
    return nibble_of_256(block + 48, i) | (block[16 + i % 32] >> i / 32 & 1) << 4;
  }
};

template <>
struct Gguf<QuantType::kQ6_K> {
  static constexpr bool kAdds = false;
  template <auto kHalf = half_at>
  QLORA_NATIVE_HD static GgufScale scale(const uint8_t* block, int i) {
    return {kHalf(block + 208) * static_cast<float>(static_cast<int8_t>(block[192 + (i >> 4)])), 0.0f};
  }
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) {  // halves of 128: 64 low nibbles, 64 high ones
    const int low = block[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
    const int high = block[128 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
    return (low | high << 4) - 32;
  }
};

template <>
struct Gguf<QuantType::kIq4Nl> : OneScale {
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) {
    constexpr CodeLevels levels = code_levels(QuantType::kIq4Nl);
    return levels.value[nibble_of_32(block + 2, i)];
  }
};

template <>
struct Gguf<QuantType::kMxfp4> {
  static constexpr bool kAdds = false;
  template <auto kHalf = half_at>
  QLORA_NATIVE_HD static GgufScale scale(const uint8_t* block, int) {
    return {half_power_of_two(block[0]), 0.0f};
  }
  QLORA_NATIVE_HD static int code(const uint8_t* block, int i) {
    constexpr CodeLevels levels = code_levels(QuantType::kMxfp4);
    return levels.value[nibble_of_32(block + 1, i)];
  }
};

template <QuantType kType>
QLORA_NATIVE_HD float gguf_value(const uint8_t* block, int element) {
  using Format = Gguf<kType>;
  const GgufScale scale = Format::scale(block, element);
  const auto code = static_cast<float>(Format::code(block, element));
  return Format::kAdds ? product_plus(code, scale.factor, scale.addend) : code * scale.factor;
}

// The level of the code 0 of types whose levels are integers one apart, by QuantType.
inline constexpr int kLowestLevels[kQuantTypes] = {0, 0, -8, 0, -16, 0, 0, 0, 0, -32, 0, 0};

// use.operator()<kType>() for a type of GGUF.
template <typename Use>
QLORA_NATIVE_HD auto with_gguf(QuantType type, const Use& use) {
  switch (type) {
    case QuantType::kQ4_0:
      return use.template operator()<QuantType::kQ4_0>();
    case QuantType::kQ4_1:
      return use.template operator()<QuantType::kQ4_1>();
    case QuantType::kQ5_0:
      return use.template operator()<QuantType::kQ5_0>();
    case QuantType::kQ5_1:
      return use.template operator()<QuantType::kQ5_1>();
    case QuantType::kQ8_0:
      return use.template operator()<QuantType::kQ8_0>();
    case QuantType::kQ4_K:
      return use.template operator()<QuantType::kQ4_K>();
    case QuantType::kQ5_K:
      return use.template operator()<QuantType::kQ5_K>();
    case QuantType::kQ6_K:
      return use.template operator()<QuantType::kQ6_K>();
    case QuantType::kMxfp4:
      return use.template operator()<QuantType::kMxfp4>();
    default:
      static_assert(kQuantTypes == 12, "a case for the new format");
      return use.template operator()<QuantType::kIq4Nl>();
  }
}

// Bytes of a weight of `numel` elements, whole blocks of them in a GGUF format.
constexpr int64_t packed_bytes(QuantType type, int64_t numel) {
  const BlockFormat& format = kBlockFormats[static_cast<int>(type)];
  return is_gguf(type) ? numel / format.elements * format.bytes : packed_bytes(numel);
}

// Where an element's bytes are, near enough to fetch them.
constexpr int64_t byte_near(QuantType type, int64_t element) {
  const BlockFormat& format = kBlockFormats[static_cast<int>(type)];
  return is_gguf(type) ? element * format.bytes / format.elements : element / 2;
}

}  // namespace qlora_native
