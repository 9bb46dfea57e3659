// Matrix products by AMX tiles, straight from 4-bit weights. See tiles.h for the shapes.
//
// A weight is decoded once a call into a panel that stays in the second cache, then meets all tokens. The decode takes
// one shift and one permutation for 32 weights: 16 bytes stand in each quarter of a register, shifted so that quarter q
// shows elements q, q + 4, q + 8, ... That order is kept for the reduction, where any order serves both operands.
#include <immintrin.h>

#include "cpu/tiles.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers hold their state only inside this scope, so that no context switch saves them for nothing.
class TileScope {
 public:
  TileScope() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

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

// Pairs (element i of the first register, element i of the second) for i in [16 half, 16 half + 16), where `order` says
// which element each place of both registers holds.
constexpr Words pairing(Words order, int half) {
  Words place_of{};
  for (int place = 0; place < 32; ++place) {
    place_of.value[order.value[place]] = static_cast<uint16_t>(place);
  }
  Words pairs{};
  for (int i = 0; i < 16; ++i) {
    pairs.value[2 * i] = place_of.value[16 * half + i];
    pairs.value[2 * i + 1] = static_cast<uint16_t>(32 + place_of.value[16 * half + i]);
  }
  return pairs;
}

constexpr Words natural_order() {
  Words order{};
  for (int place = 0; place < 32; ++place) {
    order.value[place] = static_cast<uint16_t>(place);
  }
  return order;
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

// The levels of one block as bf16, twice over, so that the fifth bit that vpermw reads is free.
inline __m512i block_table(__m512 levels, float scale) {
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
  return _mm512_broadcast_i64x4(std::bit_cast<__m256i>(rounded));
}

inline __m512i decode_32(const uint8_t* bytes, __m512i table) {
  const __m512i shift = _mm512_set_epi64(0x0008000800080008, 0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c,
                                         0, 0, 0x0004000400040004, 0x0004000400040004);
  const __m512i quarters = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(quarters, shift), table);
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

// Brings the blocks of elements [element, element + count) near. Rows are read in turns, too far apart for the hardware
// to foresee them.
inline void prefetch_blocks(const WeightView& weight, int64_t element, int64_t count) {
  const BlockFormat& format = kBlockFormats[static_cast<int>(weight.type)];
  const uint8_t* first = weight.packed + element / format.elements * format.bytes;
  for (int64_t at = 0; at < count * format.bytes / format.elements + 63; at += 64) {
    prefetch(first + at);
  }
}

// use(words) for each of `runs` runs from an element on: its values in bf16, in order.
template <typename Use>
inline void each_run_of_words(const WeightView& weight, int64_t element, int64_t runs, const Use& use) {
  with_gguf(weight.type, [&]<QuantType kType>() {
    each_run<kType>(weight.packed, element, runs, [&](const RunPlace& at, const BlockScales<kType>& scales) {
      __m512 values[2];
      each_of_run<kType>(at, scales, [&](int i, Floats codes, const GgufScale& scale) {
        values[i / kLanes] = exact_values<kType>(codes, scale);
      });
      use(std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(values[1], values[0])));
    });
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
    each_run_of_words(*source.weight, element, (stop - begin) / kRun, [&](__m512i values) {
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(words(kOrder), values));
      out += stride;
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
    __m512i even[kMostColumns / kTileStrip];
    __m512i* next = even;
    each_run_of_words(*source.weight, element, part.strips, [&](__m512i values) { *next++ = values; });
    next = even;
    each_run_of_words(*source.weight, element + source.columns, part.strips, [&](__m512i odd) {
      store_pairs(*next++, odd, kFirstNatural, kSecondNatural, out);
      out += strip_size;
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

void pack_forward(const Bf16* x, int64_t m, int64_t width, int64_t first, int64_t last, Bf16* packed) {
  static constexpr Words kOrder = decoded_order();
  const int64_t steps = (width + kTileStep - 1) / kTileStep;
  for (int64_t group = first; group < last; ++group) {
    for (int64_t step = 0; step < steps; ++step) {
      __m512i rows[16];
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t row = group * kTileRows + i;
        const int64_t left = row < m ? width - step * kTileStep : 0;
        rows[i] = _mm512_permutexvar_epi16(words(kOrder), load_up_to_32(x + row * width + step * kTileStep, left));
      }
      transpose(rows);
      Bf16* out = packed + (group * steps + step) * kTileSize;
      for (int64_t i = 0; i < kTileRows; ++i) {
        _mm512_storeu_si512(out + i * kTileStep, rows[i]);
      }
    }
  }
}

void pack_gradient(const Bf16* x, int64_t m, int64_t width, int64_t first, int64_t last, Bf16* packed) {
  const int64_t steps = (width + kTileStep - 1) / kTileStep;
  for (int64_t group = first; group < last; ++group) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = group * kTileRows + i;
      Bf16* out = packed + group * steps * kTileSize + i * kTileStep;
      for (int64_t step = 0; step < steps; ++step, out += kTileSize) {
        const int64_t left = row < m ? width - step * kTileStep : 0;
        _mm512_storeu_si512(out, load_up_to_32(x + row * width + step * kTileStep, left));
      }
    }
  }
}

// Which tokens to bring to the second cache meanwhile: those of the next pair of groups, a share a strip.
struct Ahead {
  int64_t offset = 0;  // bytes from the first tile of tokens
  int64_t lines = 0;   // cache lines a step and group
};

// Tiles 0 to 3 are the sums: [tile of columns][tile of tokens].
template <bool kForward, bool kPair>
inline void accumulate(const Bf16* panel, const Bf16* tokens, const Bf16* more_tokens, int64_t steps,
                       Ahead ahead = {}) {
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.offset += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(tokens) + ahead.offset, _MM_HINT_T1);
      if constexpr (kPair) {
        _mm_prefetch(reinterpret_cast<const char*>(more_tokens) + ahead.offset, _MM_HINT_T1);
      }
    }
    _tile_loadd(4, panel + step * kPanelStep, 64);
    _tile_loadd(6, tokens + step * kTileSize, 64);
    _tile_loadd(5, panel + step * kPanelStep + kTileSize, 64);
    if constexpr (kForward) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    } else {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(2, 6, 5);
    }
    if constexpr (kPair) {
      _tile_loadd(7, more_tokens + step * kTileSize, 64);
      if constexpr (kForward) {
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbf16ps(1, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
  }
}

constexpr int64_t kSums = kTileRows * kTileRows;  // fp32 sums of a tile

// Rows of y from sums[2][16 columns][16 tokens].
void finish_forward(const TileJob& job, const float* sums, int64_t column, int64_t token) {
  static constexpr Words kPairs = [] {
    Words order{};
    for (int i = 0; i < 16; ++i) {
      order.value[2 * i] = static_cast<uint16_t>(i);
      order.value[2 * i + 1] = static_cast<uint16_t>(16 + i);
    }
    return order;
  }();
  const int64_t columns = job.width - column < kTileStrip ? job.width - column : kTileStrip;
  const int64_t tokens = job.m - token < kTileRows ? job.m - token : kTileRows;
  const __m512 scale = _mm512_set1_ps(job.scale);
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) {
    const float* tile = sums + (2 * i / 16) * 2 * kSums + 2 * i % 16 * kTileRows;
    __m512 even = _mm512_mul_ps(_mm512_loadu_ps(tile), scale);
    __m512 odd = _mm512_mul_ps(_mm512_loadu_ps(tile + kTileRows), scale);
    if (job.bias != nullptr) {
      even = _mm512_add_ps(even, _mm512_set1_ps(2 * i < columns ? to_float(job.bias[column + 2 * i]) : 0.0f));
      odd = _mm512_add_ps(odd, _mm512_set1_ps(2 * i + 1 < columns ? to_float(job.bias[column + 2 * i + 1]) : 0.0f));
    }
    rows[i] = _mm512_permutexvar_epi16(words(kPairs), std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }
  transpose(rows);
  const __mmask32 mask = columns == kTileStrip ? ~__mmask32{0} : (1u << columns) - 1u;
  for (int64_t i = 0; i < tokens; ++i) {
    _mm512_mask_storeu_epi16(job.y + (token + i) * job.width + column, mask, rows[i]);
  }
}

// Rows of y from sums[2][16 tokens][16 columns].
void finish_gradient(const TileJob& job, const float* sums, int64_t column, int64_t token) {
  const int64_t columns = job.width - column < kTileStrip ? job.width - column : kTileStrip;
  const int64_t tokens = job.m - token < kTileRows ? job.m - token : kTileRows;
  const __mmask32 mask = columns == kTileStrip ? ~__mmask32{0} : (1u << columns) - 1u;
  const __m512 scale = _mm512_set1_ps(job.scale);
  for (int64_t i = 0; i < tokens; ++i) {
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(sums + i * kTileRows), scale);
    const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(sums + 2 * kSums + i * kTileRows), scale);
    _mm512_mask_storeu_epi16(job.y + (token + i) * job.width + column, mask,
                             std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

// One strip of 32 columns for one or two groups of tokens, over one block of the reduction.
template <bool kForward, bool kPair>
void strip_product(const TileJob& job, const Bf16* panel, int64_t first_step, int64_t steps, int64_t column,
                   int64_t group, float* partial, const Ahead& ahead) {
  alignas(64) float sums[4 * kSums];
  const bool is_first = first_step == 0;
  const bool is_last = first_step + steps == job.steps;
  if (!is_first && partial == nullptr) {
    // one strip, one or two groups: the sums never left the registers
  } else if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, partial, 64);
    _tile_loadd(1, partial + kSums, 64);
    _tile_loadd(2, partial + 2 * kSums, 64);
    _tile_loadd(3, partial + 3 * kSums, 64);
  }
  const Bf16* tokens = job.tokens + (group * job.steps + first_step) * kTileSize;
  accumulate<kForward, kPair>(panel, tokens, tokens + job.steps * kTileSize, steps, ahead);
  if (is_last && job.low_steps > 0) {
    const Bf16* low = job.low + group * job.low_steps * kTileSize;
    accumulate<kForward, kPair>(panel + steps * kPanelStep, low, low + job.low_steps * kTileSize, job.low_steps);
  }
  if (!is_last && partial == nullptr) {
    return;
  }
  float* target = is_last ? sums : partial;
  _tile_stored(0, target, 64);
  _tile_stored(1, target + kSums, 64);
  _tile_stored(2, target + 2 * kSums, 64);
  _tile_stored(3, target + 3 * kSums, 64);
  if (!is_last) {
    return;
  }
  for (int64_t i = 0; i < (kPair ? 2 : 1); ++i) {
    if constexpr (kForward) {
      finish_forward(job, sums + i * kSums, column, (group + i) * kTileRows);
    } else {
      finish_gradient(job, sums + i * kSums, column, (group + i) * kTileRows);
    }
  }
}

// The order of a sum is that of the reduction, block after block, then the adapter's: wherever the cuts between threads
// and panels fall, the bits are the same.
template <bool kForward>
void tile_product(const TileJob& job, const TileRange& range, const TileScratch& scratch) {
  const TileScope tiles;
  const int64_t pairs = (range.last_group - range.first_group + 1) / 2;
  const int64_t panel_steps = scratch.steps + job.low_steps;
  for (int64_t column = range.first_column; column < range.last_column; column += scratch.columns) {
    const int64_t columns = smaller(range.last_column - column, scratch.columns);
    const int64_t strips = (columns + kTileStrip - 1) / kTileStrip;
    for (int64_t first = 0; first < job.steps; first += scratch.steps) {
      const int64_t steps = smaller(job.steps - first, scratch.steps);
      fill_panel<kForward>(job.source, {column, strips, first, steps, panel_steps}, scratch.panel);
      if (first + steps == job.steps && job.low_steps > 0) {
        fill_panel<kForward>(job.up, {column, strips, 0, job.low_steps, panel_steps},
                             scratch.panel + steps * kPanelStep);
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t group = range.first_group + 2 * pair;
        for (int64_t strip = 0; strip < strips; ++strip) {
          const Bf16* panel = scratch.panel + strip * panel_steps * kPanelStep;
          const int64_t at = column + strip * kTileStrip;
          float* partial = scratch.partial == nullptr ? nullptr : scratch.partial + (pair * strips + strip) * 4 * kSums;
          if (group + 1 < range.last_group) {
            Ahead ahead;
            if (group + 3 < range.last_group && strip < kTileRows) {
              ahead.lines = (kTileRows + strips - 1) / strips;
              ahead.offset = 2 * job.steps * kTileBytes + strip * steps * ahead.lines * 64;
            }
            strip_product<kForward, true>(job, panel, first, steps, at, group, partial, ahead);
          } else {
            strip_product<kForward, false>(job, panel, first, steps, at, group, partial, {});
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE

#include "cpu/kernels-outer-amx-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr TileKernels kTileKernels = {pack_forward,        pack_gradient, tile_product<true>,
                                      tile_product<false>, pack_outer,    outer};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
