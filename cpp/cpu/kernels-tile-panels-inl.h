// Panels of decoded weights for AMX tiles. Included by kernels-gemm-amx-inl.h.
//
// The decode takes one shift and one permutation for 32 weights: 16 bytes stand in each quarter of a register, shifted
// so that quarter q shows elements q, q + 4, q + 8, ... That order is kept for the reduction, where any order serves
// both operands.
#pragma once

#include <immintrin.h>

#include <bit>

#include "cpu/kernels-gguf-inl.h"
#include "cpu/tiles.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

struct alignas(64) Words {
  uint16_t value[32];
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

// Whether each 64 elements of a row lie in one block and begin at a byte.
inline bool is_regular(const TileSource& source) {
  return !is_gguf(source.weight->type) && source.columns % 64 == 0 && source.weight->block_size >= 64;
}

// Whether every row begins at a run of GGUF's blocks, which is a step, too.
inline bool has_runs(const TileSource& source) {
  static_assert(kRun == kTileStep);
  return source.weight != nullptr && is_gguf(source.weight->type) && source.columns % kRun == 0;
}

// GGUF's codes of four bits are looked up, as NF4's are: a table of a run's 16 values costs less than to widen 32
// codes.
template <QuantType kType>
inline constexpr bool kHasTable =
    kType == QuantType::kQ4_0 || kType == QuantType::kQ4_1 || kType == QuantType::kQ4_K || kType == QuantType::kIq4Nl;

// Which element of a run stands at each place of its words.
template <QuantType kType>
constexpr Words run_order() {
  Words order = natural_order();
  if (kHasTable<kType> && kType != QuantType::kQ4_K) {  // as nibbles_of_32 takes 16 bytes apart
    for (int place = 0; place < 32; ++place) {
      order.value[place] = static_cast<uint16_t>(place % 8 * 2 + place / 16 + (place / 8 % 2 == 0 ? 16 : 0));
    }
  }
  return order;
}

// The codes of a run as indexes of run_table. Above them stands what vpermw does not read.
template <QuantType kType>
inline __m512i run_indexes(const RunPlace& at) {
  if constexpr (kType != QuantType::kQ4_K) {
    return nibbles_of_32(at.block + kBlockFormat<kType>.bytes - 16);
  }
  const auto* codes = reinterpret_cast<const __m256i*>(at.block + 16 + at.run / 2 * kRun);
  const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(at.run % 2 * 4));
  return _mm512_srlv_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(codes)), shift);
}

// The values of all codes under one scale.
template <QuantType kType>
inline __m512i run_table(const GgufScale& scale) {
  struct Levels {
    float value[16];
  };
  static constexpr Levels kLevels = [] {
    Levels levels{};
    for (int code = 0; code < 16; ++code) {
      levels.value[code] = static_cast<float>(kType == QuantType::kIq4Nl  ? iq4_nl_levels().value[code]
                                              : kType == QuantType::kQ4_0 ? code - 8
                                                                          : code);
    }
    return levels;
  }();
  return twice_over(exact_values<kType>(_mm512_loadu_ps(kLevels.value), scale));
}

// Brings the blocks of elements [element, element + count) near. Rows are read in turns, too far apart for the hardware
// to foresee them.
inline void prefetch_blocks(const WeightView& weight, int64_t element, int64_t count) {
  const BlockFormat& format = kBlockFormats[static_cast<int>(weight.type)];
  const uint8_t* first = weight.packed + element / format.elements * format.bytes;
  for (int64_t at = 0; at < count * format.bytes / format.elements + 63; at += 64) {
    prefetch(first + at);
  }
}

// use(words) for each of `runs` runs from an element on: its values in bf16, in run_order<kType>().
template <QuantType kType, typename Use>
inline void each_run_of_words(const WeightView& weight, int64_t element, int64_t runs, const Use& use) {
  each_run<kType>(weight.packed, element, runs, [&](const RunPlace& at, const BlockScales<kType>& scales) {
    if constexpr (kHasTable<kType>) {
      use(_mm512_permutexvar_epi16(run_indexes<kType>(at), run_table<kType>(scales.at(2 * at.run))));
    } else {
      __m512 values[2];
      each_of_run<kType>(at, scales, [&](int i, Floats codes, const GgufScale& scale) {
        values[i / kLanes] = exact_values<kType>(codes, scale);
      });
      use(std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(values[1], values[0])));
    }
  });
}

// Elements [begin, begin + 32 * steps) of one row in the decoded order, zeros beyond its end; a step every `stride`.
void fill_row(const TileSource& source, int64_t row, int64_t begin, int64_t steps, Bf16* out, int64_t stride) {
  static constexpr Words kOrder = decoded_order();
  const int64_t end = begin + steps * kTileStep;
  const int64_t stop = row >= source.rows ? begin : end < source.columns ? end : source.columns;
  if (source.weight != nullptr && row < source.rows && is_regular(source)) {
    const WeightView& weight = *source.weight;
    const __m512 levels = _mm512_loadu_ps(weight.levels);
    const int block_bits = __builtin_ctzll(static_cast<unsigned long long>(weight.block_size));
    int64_t element = row * source.columns + begin;
    const uint8_t* bytes = weight.packed + element / 2;
    for (int64_t at = begin; at < stop; at += 64, element += 64, bytes += 32, out += 2 * stride) {
      // The same row's part of the next panel: too many rows are read in turn for the hardware to foresee that.
      _mm_prefetch(reinterpret_cast<const char*>(bytes + steps * kTileStep / 2), _MM_HINT_T0);
      const __m512i table = block_table(levels, source.scales[element >> block_bits]);
      _mm512_storeu_si512(out, decode_32(bytes, table));
      _mm512_storeu_si512(out + stride, decode_32(bytes + 16, table));
    }
    for (int64_t at = stop; at < end; at += kTileStep, out += stride) {
      _mm512_storeu_si512(out, _mm512_setzero_si512());
    }
    return;
  }
  if (has_runs(source) && row < source.rows) {
    const int64_t element = row * source.columns + begin;
    prefetch_blocks(*source.weight, element + steps * kTileStep, steps * kTileStep);  // of the next panel
    with_gguf(source.weight->type, [&]<QuantType kType>() {
      static constexpr Words kPlaces = places(run_order<kType>(), kOrder);
      each_run_of_words<kType>(*source.weight, element, (stop - begin) / kRun, [&](__m512i values) {
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(words(kPlaces), values));
        out += stride;
      });
    });
    for (int64_t at = stop; at < end; at += kTileStep, out += stride) {
      _mm512_storeu_si512(out, _mm512_setzero_si512());
    }
    return;
  }
  for (int64_t at = begin; at < end; at += kTileStep, out += stride) {
    alignas(64) Bf16 decoded[kTileStep];
    const int64_t count = stop - at < kTileStep ? stop - at : kTileStep;
    const Bf16* dense = decoded;
    if (source.weight == nullptr) {
      dense = source.dense + row * source.columns + at;
    } else if (count > 0) {
      dequantize_span<Bf16>(*source.weight, row * source.columns + at, row * source.columns + at + count, decoded);
    }
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(words(kOrder), load_up_to_32(dense, count)));
  }
}

// What a panel is decoded from: `strips` of 32 columns of the product over `steps` of the reduction.
struct PanelPart {
  int64_t first_column;
  int64_t strips;
  int64_t first_step;
  int64_t steps;
  int64_t panel_steps;  // that a strip of the panel has room for
};

// Row `unit` of a forward panel, [strip][step][32 rows][32] with kPanelStep a step.
inline void fill_forward(const TileSource& source, const PanelPart& part, int64_t unit, Bf16* panel) {
  Bf16* out = panel + unit / kTileStrip * part.panel_steps * kPanelStep + unit % kTileStrip * kTileStep;
  fill_row(source, part.first_column + unit, part.first_step * kTileStep, part.steps, out, kPanelStep);
}

// 32 columns of two rows of the source as pairs, from registers in an order that `first` and `second` undo.
inline void store_pairs(__m512i even, __m512i odd, const Words& first, const Words& second, Bf16* out) {
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, words(first), odd));
  _mm512_storeu_si512(out + kTileSize, _mm512_permutex2var_epi16(even, words(second), odd));
}

// Pair `unit` of rows of a gradient panel: [strip][step][2 tiles][16 pairs of rows][16 columns][2].
void fill_gradient(const TileSource& source, const PanelPart& part, int64_t unit, Bf16* panel) {
  constexpr int64_t kRowsAhead = 24;  // rows lie too far apart for the hardware to foresee them
  static constexpr Words kFirst = pairing(decoded_order(), 0);
  static constexpr Words kSecond = pairing(decoded_order(), 1);
  static constexpr Words kFirstNatural = pairing(natural_order(), 0);
  static constexpr Words kSecondNatural = pairing(natural_order(), 1);
  const int64_t strip_size = part.panel_steps * kPanelStep;
  const int64_t row = part.first_step * kTileStep + 2 * unit;
  Bf16* out = panel + unit / kTileRows * kPanelStep + unit % kTileRows * kTileStep;
  if (source.weight != nullptr && is_regular(source) && row + 1 < source.rows) {
    const WeightView& weight = *source.weight;
    if (row + kRowsAhead + 1 < source.rows) {
      const int64_t next = (row + kRowsAhead) * source.columns + part.first_column;
      for (int64_t below = next; below <= next + source.columns; below += source.columns) {
        for (int64_t at = 0; at < part.strips * kTileStrip; at += 128) {
          _mm_prefetch(reinterpret_cast<const char*>(weight.packed + (below + at) / 2), _MM_HINT_T0);
        }
        _mm_prefetch(reinterpret_cast<const char*>(source.scales + below / weight.block_size), _MM_HINT_T0);
      }
    }
    const __m512 levels = _mm512_loadu_ps(weight.levels);
    const int block_bits = __builtin_ctzll(static_cast<unsigned long long>(weight.block_size));
    int64_t element = row * source.columns + part.first_column;
    __m512i even{};
    __m512i odd{};
    for (int64_t strip = 0; strip < part.strips; ++strip, element += kTileStrip, out += strip_size) {
      const int64_t below = element + source.columns;
      if (strip == 0 || element % 64 == 0) {
        even = block_table(levels, source.scales[element >> block_bits]);
        odd = block_table(levels, source.scales[below >> block_bits]);
      }
      store_pairs(decode_32(weight.packed + element / 2, even), decode_32(weight.packed + below / 2, odd), kFirst,
                  kSecond, out);
    }
    return;
  }
  if (has_runs(source) && row + 1 < source.rows) {
    const int64_t element = row * source.columns + part.first_column;
    for (const int64_t rows : {kRowsAhead, kRowsAhead + 1}) {
      prefetch_blocks(*source.weight, element + rows * source.columns, part.strips * kTileStrip);
    }
    with_gguf(source.weight->type, [&]<QuantType kType>() {
      static constexpr Words kFirstOfRun = pairing(run_order<kType>(), 0);
      static constexpr Words kSecondOfRun = pairing(run_order<kType>(), 1);
      __m512i even[kMostColumns / kTileStrip];
      __m512i* next = even;
      each_run_of_words<kType>(*source.weight, element, part.strips, [&](__m512i values) { *next++ = values; });
      next = even;
      each_run_of_words<kType>(*source.weight, element + source.columns, part.strips, [&](__m512i odd) {
        store_pairs(*next++, odd, kFirstOfRun, kSecondOfRun, out);
        out += strip_size;
      });
    });
    return;
  }
  for (int64_t strip = 0; strip < part.strips; ++strip, out += strip_size) {
    const int64_t column = part.first_column + strip * kTileStrip;
    const int64_t count = smaller(source.columns - column, kTileStrip);
    __m512i both[2];
    for (int64_t r = 0; r < 2; ++r) {
      alignas(64) Bf16 decoded[kTileStep];
      const Bf16* dense = decoded;
      const int64_t taken = row + r < source.rows && count > 0 ? count : 0;
      if (source.weight == nullptr) {
        dense = source.dense + (row + r) * source.columns + column;
      } else if (taken > 0) {
        const int64_t begin = (row + r) * source.columns + column;
        dequantize_span<Bf16>(*source.weight, begin, begin + taken, decoded);
      }
      both[r] = load_up_to_32(dense, taken);
    }
    store_pairs(both[0], both[1], kFirstNatural, kSecondNatural, out);
  }
}

template <bool kForward>
void fill_panel(const TileSource& source, const PanelPart& part, Bf16* panel) {
  const int64_t units = kForward ? part.strips * kTileStrip : part.steps * kTileRows;
  for (int64_t unit = 0; unit < units; ++unit) {
    if constexpr (kForward) {
      fill_forward(source, part, unit, panel);
    } else {
      fill_gradient(source, part, unit, panel);
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
