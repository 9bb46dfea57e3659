// Panels of decoded weights for AMX tiles. Included by kernels/gemm-amx-inl.h.
#pragma once

#include "cpu/kernels/tile-words-inl.h"
#include "cpu/kernels/tiles.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Whether each 64 elements of a row lie in one block and begin at a byte.
inline bool is_regular(const TileSource& source) {
  return !is_gguf(source.weight->type) && source.columns % 64 == 0 && source.weight->block_size >= 64;
}

// Whether every row begins at a run of GGUF's blocks, which is a step, too.
inline bool has_runs(const TileSource& source) {
  static_assert(kRun == kTileStep);
  return source.weight != nullptr && is_gguf(source.weight->type) && source.columns % kRun == 0;
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

constexpr int64_t kRowsAhead = 24;  // rows lie too far apart for the hardware to foresee them

// Pair `unit` of rows of a gradient panel: [strip][step][2 tiles][16 pairs of rows][16 columns][2].
void fill_gradient(const TileSource& source, const PanelPart& part, int64_t unit, Bf16* panel) {
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

// Fills what whole rows of runs of GGUF's blocks give, and returns how many units that is.
template <bool kForward, QuantType kType>
int64_t fill_by_runs(const TileSource& source, const PanelPart& part, int64_t units, Bf16* panel) {
  constexpr int64_t kAhead = 6;  // rows: more would not stay in the first cache
  const WeightView& weight = *source.weight;
  const int64_t columns = source.columns;
  if constexpr (kForward) {
    const int64_t begin = part.first_step * kTileStep;
    const int64_t steps = smaller(part.steps, (columns - begin) / kRun);
    const int64_t rows = smaller(units, source.rows - part.first_column);
    for (int64_t unit = 0; unit < rows; ++unit) {
      Bf16* out = panel + unit / kTileStrip * part.panel_steps * kPanelStep + unit % kTileStrip * kTileStep;
      const int64_t element = (part.first_column + unit) * columns + begin;
      const bool here = unit + kAhead < units;  // or in the next panel
      prefetch_blocks<kType>(weight,
                             element + (here ? kAhead : kAhead - units) * columns + (here ? 0 : part.steps * kTileStep),
                             part.steps * kTileStep);
      each_run_of_words<kType>(weight, element, steps, [&](__m512i values) __attribute__((always_inline)) {
        _mm512_storeu_si512(out, values);
        out += kPanelStep;
      });
      for (int64_t step = steps; step < part.steps; ++step, out += kPanelStep) {
        _mm512_storeu_si512(out, _mm512_setzero_si512());
      }
    }
    return rows;
  } else {
    static constexpr Words kFirst = pairing(decoded_order(), 0);
    static constexpr Words kSecond = pairing(decoded_order(), 1);
    const int64_t strip_size = part.panel_steps * kPanelStep;
    const int64_t pairs = smaller(units, (source.rows - part.first_step * kTileStep) / 2);
    for (int64_t unit = 0; unit < pairs; ++unit) {
      Bf16* out = panel + unit / kTileRows * kPanelStep + unit % kTileRows * kTileStep;
      const int64_t element = (part.first_step * kTileStep + 2 * unit) * columns + part.first_column;
      for (const int64_t rows : {kAhead, kAhead + 1}) {
        prefetch_blocks<kType>(weight, element + rows * columns, part.strips * kTileStrip);
      }
      __m512i even[kMostColumns / kTileStrip];
      __m512i* next = even;
      each_run_of_words<kType>(weight, element, part.strips,
                               [&](__m512i values) __attribute__((always_inline)) { *next++ = values; });
      next = even;
      each_run_of_words<kType>(weight, element + columns, part.strips, [&](__m512i odd) __attribute__((always_inline)) {
        store_pairs(*next++, odd, kFirst, kSecond, out);
        out += strip_size;
      });
    }
    return pairs;
  }
}

template <bool kForward>
void fill_panel(const TileSource& source, const PanelPart& part, Bf16* panel) {
  const int64_t units = kForward ? part.strips * kTileStrip : part.steps * kTileRows;
  int64_t unit = 0;
  if (has_runs(source)) {
    unit = with_gguf(source.weight->type,
                     [&]<QuantType kType>() { return fill_by_runs<kForward, kType>(source, part, units, panel); });
  }
  for (; unit < units; ++unit) {
    if constexpr (kForward) {
      fill_forward(source, part, unit, panel);
    } else {
      fill_gradient(source, part, unit, panel);
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
