// The AMX intrinsics that the kernels use (AMX-TILE, AMX-BF16), on AVX2: eight tile registers a thread.
//
// TDPBF16PS is the SDM's operation word by word: products of the even elements and of the odd ones are summed apart by
// fused multiply-adds (DAZ, FTZ, to nearest), then added to each other and to the tile. No silicon of ours has it.
#pragma once

#include "bf16.h"

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define __AMX_BF16__ 1

namespace qlora_native::cpu {
namespace {

struct TileRegister {
  alignas(64) uint8_t row[16][64];
};

struct TileState {
  uint8_t palette = 0;  // 0: not configured, and every use of a tile ends in #UD
  uint16_t row_bytes[8];
  uint8_t rows[8];
  TileRegister tile[8];

  TileRegister& at(int index) {
    if (palette != 1 || rows[index] == 0 || rows[index] > 16 || row_bytes[index] > 64 || row_bytes[index] % 4 != 0) {
      __builtin_trap();
    }
    return tile[index];
  }
};
inline thread_local TileState tile_state;

inline void _tile_loadconfig(const void* config) {  // 64 bytes: palette, then row bytes at 16 and rows at 48
  const auto* bytes = static_cast<const uint8_t*>(config);
  tile_state.palette = bytes[0];
  std::memcpy(tile_state.row_bytes, bytes + 16, sizeof tile_state.row_bytes);
  std::memcpy(tile_state.rows, bytes + 48, sizeof tile_state.rows);
  std::memset(tile_state.tile, 0, sizeof tile_state.tile);
}
inline void _tile_storeconfig(void* config) {
  std::memset(config, 0, 64);
  if (tile_state.palette != 0) {
    auto* const bytes = static_cast<uint8_t*>(config);
    bytes[0] = tile_state.palette;
    std::memcpy(bytes + 16, tile_state.row_bytes, sizeof tile_state.row_bytes);
    std::memcpy(bytes + 48, tile_state.rows, sizeof tile_state.rows);
  }
}
inline void _tile_release() { tile_state.palette = 0; }
inline void _tile_zero(int index) { tile_state.at(index) = {}; }
inline void _tile_loadd(int index, const void* base, int64_t stride) {
  TileRegister& tile = tile_state.at(index) = {};
  for (int64_t i = 0; i < tile_state.rows[index]; ++i) {
    std::memcpy(tile.row[i], static_cast<const char*>(base) + i * stride, tile_state.row_bytes[index]);
  }
}
inline void _tile_stored(int index, void* base, int64_t stride) {
  const TileRegister& tile = tile_state.at(index);
  for (int64_t i = 0; i < tile_state.rows[index]; ++i) {
    std::memcpy(static_cast<char*>(base) + i * stride, tile.row[i], tile_state.row_bytes[index]);
  }
}
// Rows [m][k] pairs of a times rows [k][n] pairs of b. The tiles' unused bytes are zero, and do no harm in the sums.
// The registers are no memory of the kernels', and sanitizers would take most of the time here.
__attribute__((no_sanitize("address", "undefined"))) inline void _tile_dpbf16ps(int sums, int a, int b) {
  const FlushSubnormals scope;
  const TileRegister& left = tile_state.at(a);
  const TileRegister& right = tile_state.at(b);
  TileRegister& target = tile_state.at(sums);
  const auto load = [](const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); };
  for (int m = 0; m < tile_state.rows[sums]; ++m) {
    for (int half = 0; half < tile_state.row_bytes[sums]; half += 32) {
      __m256 even{};
      __m256 odd{};
      for (int k = 0; k < tile_state.row_bytes[a] / 4; ++k) {
        int32_t pair = 0;
        std::memcpy(&pair, left.row[m] + 4 * k, sizeof pair);
        const __m256i x = _mm256_set1_epi32(pair);
        const __m256i y = load(right.row[k] + half);
        even = FlushSubnormals::through(_mm256_fmadd_ps(even_elements(x), even_elements(y), even));
        odd = FlushSubnormals::through(_mm256_fmadd_ps(odd_elements(x), odd_elements(y), odd));
      }
      auto* const row = reinterpret_cast<float*>(target.row[m] + half);
      const __m256 both = FlushSubnormals::through(_mm256_add_ps(even, odd));
      _mm256_store_ps(row, FlushSubnormals::through(_mm256_add_ps(_mm256_load_ps(row), both)));
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu
