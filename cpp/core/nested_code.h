// The 256-entry signed dynamic code that double quantization stores scales in.
//
// Seven decades; decade i holds 2^i values a sign, each the middle of two neighbors of linspace(0.1, 1, 2^i + 1),
// times 10^(i - 6); then 0 and 1. (Dettmers, "8-bit approximations for parallelism in deep learning", 2016, in the
// form bitsandbytes computes it: fp32, with one rounding per linspace point.)
#pragma once

#include <bit>
#include <cstdint>

namespace qlora_native {

struct NestedCode {
  float value[256];
};

namespace detail {

// One point of torch.linspace(0.1, 1, points) in fp32: step times index is exact in double, so there is one rounding.
constexpr float linspace_point(int index, int points) {
  const float step = (1.0f - 0.1f) / static_cast<float>(points - 1);
  if (index < points / 2) {
    return static_cast<float>(static_cast<double>(0.1f) + static_cast<double>(step) * index);
  }
  return static_cast<float>(1.0 - static_cast<double>(step) * (points - 1 - index));
}

constexpr NestedCode make_nested_code() {
  constexpr float decade[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  NestedCode code{};
  int above = 128;  // positive values ascend from here; index 127 is the zero
  for (int i = 0; i < 7; ++i) {
    const int count = 1 << i;
    for (int j = 0; j < count; ++j) {
      const float middle = (linspace_point(j, count + 1) + linspace_point(j + 1, count + 1)) / 2.0f;
      code.value[above] = decade[i] * middle;
      code.value[254 - above] = -code.value[above];
      ++above;
    }
  }
  code.value[127] = 0.0f;
  code.value[255] = 1.0f;
  return code;
}

}  // namespace detail

inline constexpr NestedCode kNestedCode = detail::make_nested_code();
inline constexpr int kNestedZero = 127;

// threshold[i] lies halfway between entries i and i + 1.
constexpr float nested_threshold(int i) { return (kNestedCode.value[i] + kNestedCode.value[i + 1]) * 0.5f; }

// Nearest entry; halfway between two entries the even index wins.
constexpr uint8_t nearest_nested_code(float x) {
  int low = 0;
  for (int step = 128; step > 0; step >>= 1) {
    if (low + step <= 255 && nested_threshold(low + step - 1) < x) {
      low += step;
    }
  }
  const bool tie = low < 255 && nested_threshold(low) == x;
  return static_cast<uint8_t>(tie && low % 2 == 1 ? low + 1 : low);
}

// nearest_nested_code() by one look-up, for vector kernels. The code is symmetric but for its last entry, so only the
// magnitude m in [127, 255] is looked up; a negative value's code is max(254 - m, 0). Magnitudes fall into cells by
// their exponent and kCellBits of mantissa; no cell holds two thresholds.
//
//   entry = m of the cell's lower end << 24 | the bits below the cell of the last magnitude that still takes it
struct NestedCells {
  static constexpr int kCellBits = 6;
  static constexpr int kShift = 23 - kCellBits;
  static constexpr uint32_t kLowMask = (1u << kShift) - 1;
  static constexpr uint32_t kFirst = std::bit_cast<uint32_t>(nested_threshold(kNestedZero)) >> kShift;
  static constexpr uint32_t kCount = (std::bit_cast<uint32_t>(1.0f) >> kShift) - kFirst + 1;  // up to 1 and just above
  static constexpr uint32_t kLowest = kFirst << kShift;  // smaller magnitudes are raised to this one

  uint32_t entry[kCount];
  bool valid;
};

constexpr NestedCells make_nested_cells() {
  NestedCells cells{};
  cells.valid = true;
  // A tie belongs to the even index: above an odd one the last magnitude that stays is the float before the threshold.
  const auto last_of = [](uint32_t m) {
    return std::bit_cast<uint32_t>(nested_threshold(static_cast<int>(m))) - m % 2;
  };
  uint32_t m = kNestedZero;
  for (uint32_t i = 0; i < NestedCells::kCount; ++i) {
    const uint32_t cell = NestedCells::kFirst + i;
    cells.entry[i] = m << 24 | NestedCells::kLowMask;
    if (m < 255 && last_of(m) >> NestedCells::kShift == cell) {
      cells.entry[i] = m << 24 | (last_of(m) & NestedCells::kLowMask);
      ++m;
    }
    cells.valid &= m == 255 || last_of(m) >> NestedCells::kShift > cell;
  }
  cells.valid &= m == 255;
  return cells;
}

inline constexpr NestedCells kNestedCells = make_nested_cells();
static_assert(kNestedCells.valid);

}  // namespace qlora_native
