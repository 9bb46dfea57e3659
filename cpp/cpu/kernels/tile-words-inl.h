// Weights decoded to bf16, 32 at a time. Included by kernels/tile-panels-inl.h.
//
// The decode of NF4 takes one shift and one permutation for 32 weights: 16 bytes stand in each quarter of a register,
// shifted so that quarter q shows elements q, q + 4, q + 8, ... That order is kept for the reduction, where any order
// serves both operands.
#pragma once

#include <immintrin.h>

#include <bit>

#include "cpu/kernels/gguf-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

struct alignas(64) Words {
  uint16_t value[32];
  constexpr bool operator==(const Words&) const = default;
};

// Which element of 32 stands at each place after the decode.
constexpr Words decoded_order() {
  Words order{};
  for (int place = 0; place < 32; ++place) {
    order.value[place] = static_cast<uint16_t>(4 * (place % 8) + place / 8);
  }
  return order;
}

constexpr Words natural_order() {
  Words order{};
  for (int place = 0; place < 32; ++place) {
    order.value[place] = static_cast<uint16_t>(place);
  }
  return order;
}

// Where each element of the second order stands in the first.
constexpr Words places(Words from, Words to) {
  Words place_of{};
  for (int place = 0; place < 32; ++place) {
    place_of.value[from.value[place]] = static_cast<uint16_t>(place);
  }
  Words found{};
  for (int place = 0; place < 32; ++place) {
    found.value[place] = place_of.value[to.value[place]];
  }
  return found;
}

// Pairs (element i of the first register, element i of the second) for i in [16 half, 16 half + 16), where `order` says
// which element each place of both registers holds.
constexpr Words pairing(Words order, int half) {
  const Words place_of = places(order, natural_order());
  Words pairs{};
  for (int i = 0; i < 16; ++i) {
    pairs.value[2 * i] = place_of.value[16 * half + i];
    pairs.value[2 * i + 1] = static_cast<uint16_t>(32 + place_of.value[16 * half + i]);
  }
  return pairs;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline __m512i words(const Words& value) { return _mm512_load_si512(value.value); }

inline __m512i load_up_to_32(const Bf16* p, int64_t count) {
  if (count >= 32) {
    return _mm512_loadu_si512(p);
  }
  const __mmask32 mask = count <= 0 ? 0u : (1u << count) - 1u;
  return _mm512_maskz_loadu_epi16(mask, p);
}

// As bf16, so that the fifth bit that vpermw reads is free.
inline __m512i twice_over(__m512 values) {
  return _mm512_broadcast_i64x4(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

// The levels of one block.
inline __m512i block_table(__m512 levels, float scale) {
  return twice_over(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
}

// The 32 nibbles of 16 bytes, with what stands above them.
inline __m512i nibbles_of_32(const uint8_t* bytes) {
  const __m512i shift = _mm512_set_epi64(0x0008000800080008, 0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c,
                                         0, 0, 0x0004000400040004, 0x0004000400040004);
  const __m512i quarters = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_srlv_epi16(quarters, shift);
}

inline __m512i decode_32(const uint8_t* bytes, __m512i table) {
  return _mm512_permutexvar_epi16(nibbles_of_32(bytes), table);
}

// ---------------------------------------------------------------------------------------------------------------------
// GGUF's runs

// Codes of four and five bits are looked up, as NF4's are: a table of a run's values costs less than to widen 32 codes.
template <QuantType kType>
inline constexpr int kTableBits =
    kType == QuantType::kQ8_0 || kType == QuantType::kQ6_K                                ? 0
    : kType == QuantType::kQ5_0 || kType == QuantType::kQ5_1 || kType == QuantType::kQ5_K ? 5
                                                                                          : 4;

// Scales by an address that the compiler does not know, so that loads broadcast them: broadcast from a register, one
// takes the port of the permutations.
template <typename Scales>
inline const Scales& in_memory(const Scales& scales) {
  const Scales* volatile address = &scales;
  return *address;
}

inline void read_halves(const uint8_t* from, float (&to)[8], float times = 1.0f) {
  const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  _mm256_store_ps(to, times == 1.0f ? values : _mm256_mul_ps(values, _mm256_set1_ps(times)));
}

// The values of 16 codes from kFirst on.
template <QuantType kType, int kFirst = 0>
inline __m512 table_values(const GgufScale& scale) {
  struct Levels {
    float value[16];
  };
  static constexpr Levels kLevels = [] {
    Levels levels{};
    for (int code = 0; code < 16; ++code) {
      levels.value[code] = static_cast<float>(
          has_levels(kType) ? code_levels(kType).value[code] : code + kFirst + kLowestLevels[static_cast<int>(kType)]);
    }
    return levels;
  }();
  return exact_values<kType>(_mm512_loadu_ps(kLevels.value), scale);
}

inline __m512i rounded_to_bf16(__m512 first, __m512 second) {
  return std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// What lies at `indexes` in the table of all values under one scale; above an index may stand anything.
template <QuantType kType>
inline __m512i look_up(__m512i indexes, const GgufScale& scale) {
  constexpr int kSecond = kTableBits<kType> == 4 ? 0 : 16;
  return _mm512_permutexvar_epi16(indexes,
                                  rounded_to_bf16(table_values<kType>(scale), table_values<kType, kSecond>(scale)));
}

// The lowest four bits of the words of `low`, and above them what stands there in `high`.
inline __m512i nibbles_and_bits(__m512i low, __m512i high) {
  constexpr int kSecondSelects = 0xe2;
  return _mm512_ternarylogic_epi32(low, _mm512_set1_epi16(15), high, kSecondSelects);
}

// 32 bytes in words of the decoded order: in their lower halves in even quarters, in the upper ones in odd quarters.
inline __m512i spread_bytes(const uint8_t* bytes) {
  static constexpr Words kPairs = [] {
    Words pairs = decoded_order();
    for (uint16_t& pair : pairs.value) {
      pair /= 2;
    }
    return pairs;
  }();
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return _mm512_permutexvar_epi16(words(kPairs), _mm512_castsi256_si512(all));
}
inline __m512i bits_of_spread(__m512i bytes, unsigned first) {
  const __m512i odd =
      _mm512_set_epi64(0x0008000800080008, 0x0008000800080008, 0, 0, 0x0008000800080008, 0x0008000800080008, 0, 0);
  return _mm512_srlv_epi16(bytes, _mm512_add_epi16(odd, _mm512_set1_epi16(static_cast<int16_t>(first))));
}

// 32 bytes twice. The words of 16 bits then have elements i and i + 16 of the decoded order side by side: in their
// lower halves in the first 32 bytes, in the upper ones in the last.
inline __m512i twice_32(const uint8_t* bytes) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
}
inline __m512i bits_of_twice(__m512i bytes, unsigned first) {
  const __m512i last =
      _mm512_set_epi64(0x0008000800080008, 0x0008000800080008, 0x0008000800080008, 0x0008000800080008, 0, 0, 0, 0);
  return _mm512_srlv_epi16(bytes, _mm512_add_epi16(last, _mm512_set1_epi16(static_cast<int16_t>(first))));
}

// value(q, j) at place 8 q + j, where element 4 j + q belongs.
template <typename Value>
constexpr Words by_place(const Value& value) {
  Words made{};
  for (int place = 0; place < 32; ++place) {
    made.value[place] = static_cast<uint16_t>(value(place / 8, place % 8));
  }
  return made;
}

// What undoes the place of codes that were shuffled to the highest byte of 32 bits. No product rounds otherwise for it.
constexpr float kOfHighestByte = 0x1p-24f;

// A block of one run.
template <QuantType kType>
inline __m512i words_of_block(const uint8_t* block, const GgufScale& scale) {
  if constexpr (kTableBits<kType> != 0) {
    static constexpr Words kByte = by_place([](int q, int j) { return 0x8000 | (j % 4 * 4 + q); });
    static constexpr Words kShift = by_place([](int, int j) { return j / 4 * 4; });
    const uint8_t* nibbles = block + kBlockFormat<kType>.bytes - 16;
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    __m512i indexes = _mm512_srlv_epi16(_mm512_shuffle_epi8(all, words(kByte)), words(kShift));
    if constexpr (kTableBits<kType> == 5) {
      static constexpr Words kByteOfBit = by_place([](int, int j) { return j / 2 << 8 | 0x80; });
      static constexpr Words kShiftOfBit = by_place([](int q, int j) { return 4 + j % 2 * 4 + q; });
      int bits = 0;
      std::memcpy(&bits, nibbles - 4, sizeof bits);
      const __m512i bytes = _mm512_shuffle_epi8(_mm512_set1_epi32(bits), words(kByteOfBit));
      indexes = nibbles_and_bits(indexes, _mm512_srlv_epi16(bytes, words(kShiftOfBit)));
    }
    return look_up<kType>(indexes, scale);
  } else {
    const __m512i bytes = twice_32(block + 2);
    const auto values = [&](const Words& upper) {
      return exact_values<kType>(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, words(upper))), scale);
    };
    static constexpr Words kFirst =
        by_place([](int q, int j) { return j % 2 == 0 ? 0x8080 : (j / 2 * 4 + q / 2) << 8 | 0x80; });
    static constexpr Words kSecond =
        by_place([](int q, int j) { return j % 2 == 0 ? 0x8080 : (j / 2 * 4 + q / 2 + 2) << 8 | 0x80; });
    return rounded_to_bf16(values(kFirst), values(kSecond));
  }
}

// use(words) for the eight runs of a block, in the decoded order.
template <QuantType kType, typename Use>
__attribute__((always_inline)) inline void each_run_of_block(const uint8_t* block, const Use& use) {
  constexpr bool kSix = kType == QuantType::kQ6_K;
  alignas(32) float halves[8];
  read_halves(block + (kSix ? kBlockFormat<kType>.bytes - 16 : 0), halves);
  const auto& read = in_memory(halves);
  const BlockScales<kType> made(block, read[kSix ? 7 : 0], read[1]);
  const BlockScales<kType>& scales = in_memory(made);
  __m512i low[2];
  __m512i high{};
  if constexpr (kType == QuantType::kQ5_K) {
    high = _mm512_slli_epi32(bits_of_spread(spread_bytes(block + 16), 0), 4);
  }
  // Counts of bits are uint8_t where compilers disagree on the sign of what an intrinsic takes.
#pragma GCC unroll 8
  for (unsigned run = 0; run < 8; ++run) {
    if constexpr (kType == QuantType::kQ4_K) {  // a table serves two runs
      if (run % 2 == 0) {
        low[0] = spread_bytes(block + 16 + run / 2 * kRun);
        high = rounded_to_bf16(table_values<kType>(scales.at(2 * run)), table_values<kType>(scales.at(2 * run + 2)));
      }
      const __m512i second = _mm512_set1_epi16(static_cast<int16_t>(run % 2 * 16));
      use(_mm512_permutexvar_epi16(nibbles_and_bits(bits_of_spread(low[0], run % 2 * 4), second), high));
    } else if constexpr (kType == QuantType::kQ5_K) {
      if (run % 2 == 0) {
        low[0] = spread_bytes(block + 48 + run / 2 * kRun);
      }
      const __m512i indexes =
          nibbles_and_bits(bits_of_spread(low[0], run % 2 * 4), _mm512_srli_epi16(high, static_cast<uint8_t>(run)));
      use(look_up<kType>(indexes, scales.at(2 * run)));
    } else {
      if (run % 4 == 0) {
        high = _mm512_slli_epi32(bits_of_twice(twice_32(block + 128 + run / 4 * kRun), 0), 4);
      }
      if (run % 4 < 2) {
        low[run % 2] = twice_32(block + run / 4 * 64 + run % 2 * kRun);
      }
      const __m512i codes = nibbles_and_bits(bits_of_twice(low[run % 2], run % 4 / 2 * 4),
                                             _mm512_srli_epi16(high, static_cast<uint8_t>(run % 4 * 2)));
      const __m512i factors = _mm512_mask_mov_epi32(_mm512_castps_si512(all(scales.at(2 * run).factor)), 0xf0f0,
                                                    _mm512_castps_si512(all(scales.at(2 * run + 1).factor)));
      const auto values = [&](int bits, int power, float zero) {  // as floats that begin with a power of two
        constexpr int kFirstMasksSecondOrThird = 0xea;
        const __m512i shifted = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(bits), _mm512_set1_epi32(power),
                                                          kFirstMasksSecondOrThird);
        const __m512 code = _mm512_sub_ps(_mm512_castsi512_ps(shifted), _mm512_set1_ps(zero));
        return _mm512_mul_ps(code, _mm512_castsi512_ps(factors));
      };
      use(rounded_to_bf16(values(63, 0x4b000000, 0x1p23f + 32.0f), values(63 << 16, 0x43000000, 128.0f + 32.0f)));
    }
  }
}

// All of a block of which not all is wanted.
template <QuantType kType>
__attribute__((noinline)) void decode_block(const uint8_t* block, Bf16* out) {
  each_run_of_block<kType>(block, [&](__m512i words) __attribute__((always_inline)) {
    _mm512_storeu_si512(out, words);
    out += kRun;
  });
}

// use(words) for each of `runs` runs from an element on: its values in bf16, in the decoded order.
template <QuantType kType, typename Use>
__attribute__((always_inline)) inline void each_run_of_words(const WeightView& weight, int64_t element, int64_t runs,
                                                             const Use& use) {
  constexpr int64_t kAtOnce = 8;
  auto [block, run] = run_at<kType>(weight.packed, element);
  alignas(32) float scale[8];  // and what follows
  const auto& read = in_memory(scale);
  while (runs > 0) {
    const int64_t count = smaller(runs, kAtOnce - int64_t{run});
    runs -= count;
    if constexpr (kRunsOfBlock<kType> == 1) {
      for (int64_t i = 0; i < count; ++i, block += kBlockFormat<kType>.bytes) {
        if constexpr (kType == QuantType::kMxfp4) {
          scale[0] = half_power_of_two(block[0]);
        } else {
          read_halves(block, scale, kType == QuantType::kQ8_0 ? kOfHighestByte : 1.0f);
        }
        use(words_of_block<kType>(block, {read[0], read[1]}));
      }
    } else {
      if (count == kAtOnce) {
        each_run_of_block<kType>(block, use);
      } else {
        alignas(64) Bf16 decoded[kAtOnce * kRun];
        decode_block<kType>(block, decoded);
        for (int64_t i = run; i < run + count; ++i) {
          use(_mm512_load_si512(decoded + i * kRun));
        }
        run = 0;
      }
      block += kBlockFormat<kType>.bytes;
    }
  }
}

// Brings the blocks of elements [element, element + count) near. Rows are read in turns, too far apart for the hardware
// to foresee them.
template <QuantType kType>
inline void prefetch_blocks(const WeightView& weight, int64_t element, int64_t count) {
  const uint8_t* first = run_at<kType>(weight.packed, element).block;
  for (int64_t at = 0; at < count * kBlockFormat<kType>.bytes / kBlockFormat<kType>.elements + 63; at += 64) {
    prefetch(first + at);
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
