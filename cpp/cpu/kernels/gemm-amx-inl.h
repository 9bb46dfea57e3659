// Matrix products by AMX tiles, straight from 4-bit weights. See tiles.h for the shapes.
//
// A weight is decoded once a call into a panel that stays in the second cache, then meets all tokens.
#include <immintrin.h>

#include "cpu/kernels/tile-panels-inl.h"
#include "cpu/kernels/tile-scope-inl.h"
#include "cpu/kernels/tiles.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

void pack_forward(const Bf16* x, int64_t m, int64_t width, int64_t stride, int64_t first, int64_t last, Bf16* packed) {
  static constexpr Words kOrder = decoded_order();
  const int64_t steps = (width + kTileStep - 1) / kTileStep;
  for (int64_t group = first; group < last; ++group) {
    for (int64_t step = 0; step < steps; ++step) {
      __m512i rows[16];
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t row = group * kTileRows + i;
        const int64_t left = row < m ? width - step * kTileStep : 0;
        rows[i] = _mm512_permutexvar_epi16(words(kOrder), load_up_to_32(x + row * stride + step * kTileStep, left));
      }
      transpose(rows);
      Bf16* out = packed + (group * steps + step) * kTileSize;
      for (int64_t i = 0; i < kTileRows; ++i) {
        _mm512_storeu_si512(out + i * kTileStep, rows[i]);
      }
    }
  }
}

void pack_gradient(const Bf16* x, int64_t m, int64_t width, int64_t stride, int64_t first, int64_t last, Bf16* packed) {
  const int64_t steps = (width + kTileStep - 1) / kTileStep;
  for (int64_t group = first; group < last; ++group) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = group * kTileRows + i;
      Bf16* out = packed + group * steps * kTileSize + i * kTileStep;
      for (int64_t step = 0; step < steps; ++step, out += kTileSize) {
        const int64_t left = row < m ? width - step * kTileStep : 0;
        _mm512_storeu_si512(out, load_up_to_32(x + row * stride + step * kTileStep, left));
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
  const int64_t packed_steps = job.last_step - job.first_step;
  const Bf16* tokens = job.tokens + (group * packed_steps + first_step - job.first_step) * kTileSize;
  accumulate<kForward, kPair>(panel, tokens, tokens + packed_steps * kTileSize, steps, ahead);
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

// The order of a sum is that of the reduction, block after block, then the adapter's: wherever the cuts between
// threads, panels and parts fall, the bits are the same.
template <bool kForward>
void tile_product(const TileJob& job, const TileRange& range, const TileScratch& scratch) {
  const TileScope tiles;
  const int64_t pairs = (range.last_group - range.first_group + 1) / 2;
  const int64_t panel_steps = scratch.steps + job.low_steps;
  const int64_t packed_steps = job.last_step - job.first_step;
  for (int64_t column = range.first_column; column < range.last_column; column += scratch.columns) {
    const int64_t columns = smaller(range.last_column - column, scratch.columns);
    const int64_t strips = (columns + kTileStrip - 1) / kTileStrip;
    const int64_t others = packed_steps == job.steps ? 0 : (column - range.first_column) / kTileStrip * pairs;
    for (int64_t first = job.first_step; first < job.last_step; first += scratch.steps) {
      const int64_t steps = smaller(job.last_step - first, scratch.steps);
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
          float* partial =
              scratch.partial == nullptr ? nullptr : scratch.partial + (others + pair * strips + strip) * 4 * kSums;
          if (group + 1 < range.last_group) {
            Ahead ahead;
            if (group + 3 < range.last_group && strip < kTileRows) {
              ahead.lines = (kTileRows + strips - 1) / strips;
              ahead.offset = 2 * packed_steps * kTileBytes + strip * steps * ahead.lines * 64;
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

#include "cpu/kernels/outer-amx-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr TileKernels kTileKernels = {pack_forward,        pack_gradient, tile_product<true>,
                                      tile_product<false>, pack_outer,    outer};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
