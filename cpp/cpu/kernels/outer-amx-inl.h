// Outer products of activations by AMX tiles: the gradients of a low-rank adapter. Included by kernels/gemm-amx-inl.h.
#include "cpu/kernels/tiles.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

void pack_outer(const Bf16* left, int64_t m, int64_t r, Bf16* packed) {
  const int64_t steps = (m + kTileStep - 1) / kTileStep;
  for (int64_t tile = 0; tile * kTileRows < r; ++tile) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      for (int64_t token = 0; token < steps * kTileStep; ++token) {
        const int64_t row = tile * kTileRows + i;
        Bf16* out = packed + (tile * steps + token / kTileStep) * kTileSize + i * kTileStep + token % kTileStep;
        *out = row < r && token < m ? left[token * r + row] : Bf16{};
      }
    }
  }
}

constexpr int64_t kOuterSteps = 8;  // of 32 tokens, paired up before they are multiplied

// Sums run over the tokens in order. 64 columns at a time: four tiles of sums for each 16 rows of the result.
void outer(const Bf16* packed_left, int64_t r, const Bf16* right, int64_t m, int64_t width, float scale, int64_t first,
           int64_t last, float* out) {
  static constexpr Words kFirst = pairing(natural_order(), 0);
  static constexpr Words kSecond = pairing(natural_order(), 1);
  const TileScope tiles;
  alignas(64) Bf16 pairs[kOuterSteps * 4 * kTileSize];
  alignas(64) float sums[4 * kSums];
  const int64_t steps = (m + kTileStep - 1) / kTileStep;
  for (int64_t column = first; column < last; column += 64) {
    const int64_t columns = last - column < 64 ? last - column : 64;
    for (int64_t tile = 0; tile * kTileRows < r; ++tile) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t begin = 0; begin < steps; begin += kOuterSteps) {
        const int64_t count = steps - begin < kOuterSteps ? steps - begin : kOuterSteps;
        for (int64_t pair = 0; pair < count * kTileRows; ++pair) {
          const int64_t row = begin * kTileStep + 2 * pair;
          Bf16* to = pairs + pair / kTileRows * 4 * kTileSize + pair % kTileRows * kTileStep;
          for (int64_t half = 0; half < 2; ++half, to += 2 * kTileSize) {
            const Bf16* from = right + row * width + column + half * 32;
            const __m512i even = load_up_to_32(from, row < m ? columns - half * 32 : 0);
            const __m512i odd = load_up_to_32(from + width, row + 1 < m ? columns - half * 32 : 0);
            store_pairs(even, odd, kFirst, kSecond, to);
          }
        }
        for (int64_t step = 0; step < count; ++step) {
          const Bf16* from = pairs + step * 4 * kTileSize;
          _tile_loadd(4, packed_left + (tile * steps + begin + step) * kTileSize, 64);
          _tile_loadd(5, from, 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_loadd(6, from + kTileSize, 64);
          _tile_dpbf16ps(1, 4, 6);
          _tile_loadd(7, from + 2 * kTileSize, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_loadd(5, from + 3 * kTileSize, 64);
          _tile_dpbf16ps(3, 4, 5);
        }
      }
      _tile_stored(0, sums, 256);
      _tile_stored(1, sums + 16, 256);
      _tile_stored(2, sums + 32, 256);
      _tile_stored(3, sums + 48, 256);
      for (int64_t i = 0; i < kTileRows && tile * kTileRows + i < r; ++i) {
        for (int64_t j = 0; j < columns; j += kTileRows) {
          const __mmask16 mask = static_cast<__mmask16>(columns - j >= 16 ? 0xffff : (1 << (columns - j)) - 1);
          const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(sums + i * 64 + j), _mm512_set1_ps(scale));
          _mm512_mask_storeu_ps(out + (tile * kTileRows + i) * width + column + j, mask, scaled);
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
