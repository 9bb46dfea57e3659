// How a launch is cut into thread blocks, and whether addresses allow vectors. Pure functions, in 64 bits throughout.
#pragma once

#include <cstdint>
#include <limits>

#include "core/half.h"
#include "core/layout.h"

namespace qlora_native::cuda {

inline constexpr int kVectorBytes = 16;                                  // what one thread loads or stores at once
inline constexpr int64_t kMostBlocks = std::numeric_limits<int>::max();  // of gridDim.x

// Thread blocks for `items`, at least one. Beyond `most`, a kernel strides over the rest.
constexpr unsigned grid_blocks(int64_t items, int64_t items_per_block, int64_t most = kMostBlocks) {
  const int64_t wanted = ceil_div(items, items_per_block);
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

// The first item of a thread block; of gridDim.x, how far the grid reaches.
QLORA_NATIVE_HD constexpr int64_t first_item(unsigned block, int64_t items_per_block) {
  return static_cast<int64_t>(block) * items_per_block;
}

// The smaller one, 0 if it is negative.
QLORA_NATIVE_HD constexpr int at_most(int64_t count, int most) {
  return count < 0 ? 0 : count < most ? static_cast<int>(count) : most;
}

template <typename... Pointers>
QLORA_NATIVE_HD bool are_aligned(int64_t bytes, const Pointers*... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) % static_cast<uintptr_t>(bytes) == 0) && ...);
}

}  // namespace qlora_native::cuda
