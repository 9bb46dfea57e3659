// Sizes of a quantized weight. Blocks run over the flattened tensor, so only the element count matters.
#pragma once

#include <cstdint>

namespace qlora_native {

inline constexpr int64_t kNestedBlock = 256;  // scales that share one nested scale
inline constexpr int64_t kMinBlock = 32;
inline constexpr int64_t kMaxBlock = 4096;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t rounded_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }
constexpr int64_t packed_bytes(int64_t numel) { return ceil_div(numel, 2); }
constexpr int64_t num_blocks(int64_t numel, int64_t block_size) { return ceil_div(numel, block_size); }
constexpr int64_t num_nested_blocks(int64_t blocks) { return ceil_div(blocks, kNestedBlock); }

constexpr bool is_block_size(int64_t block_size) {
  return block_size >= kMinBlock && block_size <= kMaxBlock && (block_size & (block_size - 1)) == 0;
}

}  // namespace qlora_native
