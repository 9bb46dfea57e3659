// The matrices of causal attention: how operands lie, how rows of a tensor are packed into them, and their product.
//
// Operands are bf16 where an instruction multiplies pairs of it, floats otherwise; sums are floats. A first operand and
// a result lie in panels of 32 columns, element (row, column) at [column / 32][row][column % 32]. A second operand lies
// in tiles of 32 (depth) x 16: floats row by row, bf16 in pairs, where row r holds elements 2 r and 2 r + 1 of each of
// the 16 columns, as AMX tiles and vdpbf16ps take them.
#pragma once

#if defined(__AMX_BF16__)
#include "cpu/kernels/tile-scope-inl.h"
#endif
#include "cpu/isa/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kPanelWidth = 32;                     // columns of a panel, depth of a tile
constexpr int64_t kTile = 16 * kPanelWidth;             // elements
constexpr int64_t kSquare = kPanelWidth * kPanelWidth;  // elements of 32 rows of a panel, or of two tiles

// The type of the operands that tensors of T are packed into.
template <typename T>
struct PackedAs {
  using Type = float;
};
#if defined(QLORA_NATIVE_BF16_PAIRS)
template <>
struct PackedAs<Bf16> {
  using Type = Bf16;
};
#endif

template <typename T>
using Packed = typename PackedAs<T>::Type;

// A first operand or a result, from the row that data points at.
template <typename E>
struct Panels {
  E* data;
  int64_t stride;  // from a panel to the next, in elements
};

// A second operand: tile (step, column) at data + step * step_stride + column * column_stride.
template <typename E>
struct Tiles {
  const E* data;
  int64_t step_stride;
  int64_t column_stride;
};

// ---------------------------------------------------------------------------------------------------------------------
// Products

// Sums of a tile of the result stay in registers: kRows x 16 kColumns of them. A column of kDepth tiles of the second
// operand is 16 KiB, so that it stays in the first-level cache while the rows go by.
template <typename E>
struct Micro {
  static constexpr int kRows = kSixteenRows;
  static constexpr int kColumns = kSixteenColumns;
  static constexpr int64_t kDepth = 32 / sizeof(E);
};

// sums += an element of a times 16 of b.
inline Sixteen add_products(const float* a, const float* b, Sixteen sums) {
  return multiply_add(splat(*a), load16(b), sums);
}
constexpr int64_t depth_of(const float*) { return 1; }
constexpr int64_t depth_of(const Bf16*) { return 2; }

// c [kRows, 16 kColumns] (+)= a [kRows, 32 steps] b.
template <int kRows, typename E>
inline void multiply_tile(const E* a, int64_t a_stride, const E* b, const Tiles<E>& tiles, int64_t steps, float* c,
                          bool accumulate) {
  constexpr int kColumns = Micro<E>::kColumns;
  Sixteen sums[static_cast<size_t>(kRows)][static_cast<size_t>(kColumns)];
  for (int r = 0; r < kRows; ++r) {
    for (int column = 0; column < kColumns; ++column) {
      sums[r][column] = accumulate ? load16(c + r * kPanelWidth + column * kSixteen) : splat(0.0f);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t depth = 0; depth < kPanelWidth; depth += depth_of(a)) {
      for (int r = 0; r < kRows; ++r) {
        for (int column = 0; column < kColumns; ++column) {
          const E* operand = b + column * tiles.column_stride + depth * kSixteen;
          sums[r][column] = add_products(a + r * kPanelWidth + depth, operand, sums[r][column]);
        }
      }
    }
    a += a_stride;
    b += tiles.step_stride;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int column = 0; column < kColumns; ++column) {
      store16(c + r * kPanelWidth + column * kSixteen, sums[r][column]);
    }
  }
}

#if defined(__AMX_BF16__)

// c [32, 32] (+)= a [32, 32 steps] b.
inline void multiply_square(Panels<const Bf16> a, Tiles<Bf16> b, int64_t steps, float* c, bool accumulate) {
  constexpr size_t kRowBytes = kPanelWidth * sizeof(Bf16);
  constexpr size_t kSumBytes = kPanelWidth * sizeof(float);
  float* c_low = c + 16 * kPanelWidth;
  if (accumulate) {
    _tile_loadd(0, c, kSumBytes);
    _tile_loadd(1, c + 16, kSumBytes);
    _tile_loadd(2, c_low, kSumBytes);
    _tile_loadd(3, c_low + 16, kSumBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const Bf16* rows = a.data + step * a.stride;
    const Bf16* pairs = b.data + step * b.step_stride;
    _tile_loadd(4, rows, kRowBytes);
    _tile_loadd(5, rows + 16 * kPanelWidth, kRowBytes);
    _tile_loadd(6, pairs, 64);
    _tile_loadd(7, pairs + b.column_stride, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kSumBytes);
  _tile_stored(1, c + 16, kSumBytes);
  _tile_stored(2, c_low, kSumBytes);
  _tile_stored(3, c_low + 16, kSumBytes);
}

#else

class TileScope {};

#endif

// c [rows, columns] (+)= a [rows, 32 steps] b; rows and columns are multiples of 32.
template <typename E>
[[gnu::noinline]] void multiply_panels(Panels<const E> a, Tiles<E> b, int64_t rows, int64_t columns, int64_t steps,
                                       Panels<float> c, bool accumulate) {
#if defined(__AMX_BF16__)
  if constexpr (sizeof(E) == sizeof(Bf16)) {
    for (int64_t column = 0; column < columns; column += kPanelWidth) {
      const Tiles<E> right{b.data + column / 16 * b.column_stride, b.step_stride, b.column_stride};
      float* panel = c.data + column / kPanelWidth * c.stride;
      for (int64_t row = 0; row < rows; row += kPanelWidth) {
        multiply_square({a.data + row * kPanelWidth, a.stride}, right, steps, panel + row * kPanelWidth, accumulate);
      }
    }
    return;
  }
#endif
  constexpr int kRows = Micro<E>::kRows;
  constexpr int kRest = kRows < 4 ? kRows : 4;  // 32 = 6 + 6 + 6 + 6 + 4 + 4, and so on
  for (int64_t column = 0; column < columns; column += kSixteen * Micro<E>::kColumns) {
    const E* tiles = b.data + column / kSixteen * b.column_stride;
    float* panel = c.data + column / kPanelWidth * c.stride + column % kPanelWidth;
    for (int64_t step = 0; step < steps; step += Micro<E>::kDepth) {
      const int64_t depth = steps - step < Micro<E>::kDepth ? steps - step : Micro<E>::kDepth;
      const E* left = a.data + step * a.stride;
      const E* right = tiles + step * b.step_stride;
      const bool adds = accumulate || step > 0;
      int64_t row = 0;
      for (; rows - row > 8 || rows - row == kRows; row += kRows) {
        multiply_tile<kRows>(left + row * kPanelWidth, a.stride, right, b, depth, panel + row * kPanelWidth, adds);
      }
      for (; row < rows; row += kRest) {
        multiply_tile<kRest>(left + row * kPanelWidth, a.stride, right, b, depth, panel + row * kPanelWidth, adds);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing

inline void store_narrow(float* out, Sixteen a) { store16(out, a); }

inline void store_two_rows(float* tile, int64_t row, Sixteen a, Sixteen b) {
  store16(tile + row * kSixteen, a);
  store16(tile + (row + 1) * kSixteen, b);
}

// The first `count` of sixteen elements, of any number of them, and zeros behind.
template <typename T>
inline Sixteen load_upto(const T* p, int64_t count) {
  return count >= kSixteen ? load16(p) : count > 0 ? load_some(p, count, 0.0f) : splat(0.0f);
}
template <typename T>
inline void store_upto(T* p, int64_t count, Sixteen a) {
  if (count >= kSixteen) {
    store16(p, a);
  } else if (count > 0) {
    store_some(p, count, a);
  }
}

// The first `rows` x `columns` of a tensor, into 32 rows of a panel; zeros behind.
template <typename T, typename E>
inline void load_square(const T* x, int64_t row_stride, int64_t rows, int64_t columns, E* out) {
  for (int64_t row = 0; row < kPanelWidth; ++row, out += kPanelWidth) {
    const T* from = x + row * row_stride;
    if constexpr (sizeof(T) == sizeof(E)) {
      if (row < rows && columns >= kPanelWidth) {
        std::memcpy(out, from, kPanelWidth * sizeof(E));
        continue;
      }
    }
    for (int64_t half = 0; half < kPanelWidth; half += kSixteen) {
      store16(out + half, load_upto(from + half, row < rows ? columns - half : 0));
    }
  }
}

// 32 rows of a panel as the two tiles of their transpose.
template <typename E>
inline void tiles_of_transpose(const E* square, E* out, int64_t column_stride) {
  constexpr int64_t kWord = sizeof(float) / sizeof(E);  // elements that stay together
  for (int64_t half = 0; half < 2; ++half, out += column_stride) {
    for (int64_t column = 0; column < kPanelWidth; column += 16 * kWord) {
      Sixteen transposed[16];
      transpose_16(square + 16 * half * kPanelWidth + column, kPanelWidth * sizeof(E), transposed);
      for (int64_t row = 0; row < 16; ++row) {
        std::memcpy(out + (column + row * kWord) * kSixteen, transposed + row, sizeof(Sixteen));
      }
    }
  }
}

// 32 rows of a panel as the two tiles of themselves.
template <typename E>
inline void tiles_of(const E* square, E* out) {
  for (int64_t half = 0; half < kPanelWidth; half += kSixteen, out += kTile) {
    for (int64_t row = 0; row < kPanelWidth; row += 2) {
      const E* even = square + row * kPanelWidth + half;
      store_two_rows(out, row, load16(even), load16(even + kPanelWidth));
    }
  }
}

// 32 rows of a panel, transposed.
template <typename E>
inline void transpose_square(const E* square, E* out) {
  for (int64_t row = 0; row < kPanelWidth; row += kSixteen) {
    for (int64_t column = 0; column < kPanelWidth; column += kSixteen) {
      float words[16 * 16];
      for (int64_t r = 0; r < 16; ++r) {
        store16(words + 16 * r, load16(square + (row + r) * kPanelWidth + column));
      }
      Sixteen transposed[16];
      transpose_16(words, 16 * sizeof(float), transposed);
      for (int64_t c = 0; c < 16; ++c) {
        store16(out + (column + c) * kPanelWidth + row, transposed[c]);
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
