// The 4-bit codes: levels, decision boundaries and nibble order. The only home of these numbers.
//
// NF4: 16 quantiles of the standard normal distribution, scaled to [-1, 1] with an exact zero (Dettmers et al.,
// "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E). FP4: sign, two exponent bits, one mantissa bit,
// magnitudes {0, 1/16, 8, 12, 4, 6, 2, 3} / 12. Both are laid out as bitsandbytes stores them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/half.h"

namespace qlora_native {

// The block formats of GGUF, from kQ4_0 on, are in gguf.h; the others have the 16 levels below.
enum class QuantType : int {
  kNf4 = 0,
  kFp4 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 4,
  kQ5_1 = 5,
  kQ8_0 = 6,
  kQ4_K = 7,
  kQ5_K = 8,
  kQ6_K = 9,
  kIq4Nl = 10,
  kMxfp4 = 11,
};

struct Levels {
  float value[16];
};

constexpr Levels nf4_levels() {
  return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
           -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
           0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
           1.0f}};
}

// Code 8 is the negative zero; it decodes to +0 so that every device gives the same bytes.
constexpr Levels fp4_levels() {
  constexpr float magnitude[8] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f};
  Levels levels{};
  for (int i = 0; i < 8; ++i) {
    levels.value[i] = magnitude[i] / 12.0f;
    levels.value[i + 8] = i == 0 ? 0.0f : -levels.value[i];
  }
  return levels;
}

constexpr Levels levels_of(QuantType type) { return type == QuantType::kNf4 ? nf4_levels() : fp4_levels(); }

// boundary[i] separates code i from code i + 1: the midpoint of their levels in fp32. A value equal to it takes the
// lower code. The 16th entry only pads the table for vector loads.
struct Nf4Boundaries {
  float value[16];
};

constexpr Nf4Boundaries nf4_boundaries() {
  constexpr Levels levels = nf4_levels();
  Nf4Boundaries boundaries{};
  for (int i = 0; i < 15; ++i) {
    boundaries.value[i] = (levels.value[i] + levels.value[i + 1]) / 2.0f;
  }
  boundaries.value[15] = std::bit_cast<float>(0x7f800000u);
  return boundaries;
}

// FP4 decides on magnitudes, with the constants of bitsandbytes' CUDA kernel (not exact midpoints): rank = how many
// pivots lie strictly below |x|; code_of_rank[rank] is the code, bit 3 is set for x < 0.
struct Fp4Pivots {
  float value[8];
};

constexpr Fp4Pivots fp4_pivots() {
  return {{0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f,
           std::bit_cast<float>(0x7f800000u)}};
}

struct Fp4CodeOfRank {
  int32_t code[8];
};

constexpr Fp4CodeOfRank fp4_code_of_rank() { return {{0, 1, 6, 7, 4, 5, 2, 3}}; }

// Equal cells over [-1, 1], the c-th around c / kCellsPerUnit, so narrow that none holds two decision points: a code is
// that of its cell's lower end, or the next one where the cell's decision point lies strictly below the value. Vector
// kernels find a cell with one fused multiply-add: the low five bits of value * kCellsPerUnit + kCellMagic are c
// mod 32.
inline constexpr float kCellsPerUnit = 14.0f;
inline constexpr float kCellMagic = 0x1.8p23f;  // adding it rounds to an integer, which lands in the lowest bits

template <int kCells>
struct CodeCells {
  float decision[static_cast<size_t>(kCells)];  // infinity where the cell has none
  int32_t lower[static_cast<size_t>(kCells)];   // rank of the cell's lower end: how many decision points lie below it
  bool valid;  // one decision point a cell at most, and none within a thousandth of an edge
};

template <int kCells>
constexpr CodeCells<kCells> code_cells(const float* decisions, int count, int first_cell) {
  constexpr double kMargin = 1e-3;
  CodeCells<kCells> cells{};
  cells.valid = true;
  int below = 0;
  for (int cell = first_cell; cell < first_cell + kCells; ++cell) {
    const int slot = ((cell % kCells) + kCells) % kCells;
    const double upper_edge = (cell + 0.5) / static_cast<double>(kCellsPerUnit);
    cells.decision[slot] = std::bit_cast<float>(0x7f800000u);
    cells.lower[slot] = below;
    int held = 0;
    for (; below < count && static_cast<double>(decisions[below]) < upper_edge; ++below, ++held) {
      const double gap = upper_edge - static_cast<double>(decisions[below]);
      cells.valid &= gap > kMargin && gap < 1.0 / static_cast<double>(kCellsPerUnit) - kMargin;
      cells.decision[slot] = decisions[below];
    }
    cells.valid &= held <= 1;
  }
  cells.valid &= below == count;
  return cells;
}

// Cells -16 to 15; only -14 to 14 are met.
constexpr CodeCells<32> nf4_cells() { return code_cells<32>(nf4_boundaries().value, 15, -16); }
static_assert(nf4_cells().valid);

// Cells 0 to 15 of the magnitude, with the codes on either side of the cell's pivot.
struct Fp4CodeCells {
  float pivot[16];
  int32_t below[16];
  int32_t above[16];
};

constexpr Fp4CodeCells fp4_code_cells() {
  constexpr CodeCells<16> cells = code_cells<16>(fp4_pivots().value, 7, 0);
  static_assert(cells.valid);
  constexpr Fp4CodeOfRank code_of_rank = fp4_code_of_rank();
  Fp4CodeCells codes{};
  for (int i = 0; i < 16; ++i) {
    codes.pivot[i] = cells.decision[i];
    codes.below[i] = code_of_rank.code[cells.lower[i]];
    codes.above[i] = code_of_rank.code[cells.lower[i] < 7 ? cells.lower[i] + 1 : 7];
  }
  return codes;
}

// The code of 0.0: what an all-zero block and the missing half of an odd last byte are filled with.
constexpr uint8_t zero_code(QuantType type) { return type == QuantType::kNf4 ? 7 : 0; }

// Element 2i lies in the high nibble of byte i, element 2i + 1 in the low one.
constexpr uint8_t pack_nibbles(uint8_t even, uint8_t odd) { return static_cast<uint8_t>(even << 4 | odd); }

}  // namespace qlora_native
