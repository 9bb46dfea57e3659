// The block's shared memory: one region for dynamic memory and one for each WP_SHARED array, of the exact size, with
// gaps between them that nobody may touch, filled with NaN (0xff) for every block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_on_cpu/site.h"

namespace cuemu {

inline constexpr size_t kArenaBytes = 1 << 20;
inline constexpr int kUnwritten = 0xff;  // every byte: a NaN as fp32, bf16 and fp16

inline std::byte* shared_arena = nullptr;  // [kArenaBytes], set by the first launch

// Lies within the arena, though perhaps in none of its regions.
inline bool is_shared(const void* address) {
  return static_cast<size_t>(static_cast<const std::byte*>(address) - shared_arena) < kArenaBytes;
}

inline size_t arena_offset(const void* address) {
  return static_cast<size_t>(static_cast<const std::byte*>(address) - shared_arena);
}

void begin_shared(size_t dynamic_bytes);
void refill_shared();
void end_shared();

// Which array's surroundings were overwritten, in words; empty if none was. After every block.
std::string overrun_region();

void* dynamic_shared(size_t align, Site site);

// The array of the declaration that `key` stands for; the same one for every thread of the block. It is aligned to
// `align` and to no more.
void* shared_array(const void* key, const char* name, size_t num_bytes, size_t align, Site site);

// Error unless all bytes lie within one region.
void check_within_shared(const void* address, size_t num_bytes, Where where);

// An address of shared memory that no copy and no matrix may use otherwise: within one region and a multiple of 16.
void check_shared_16(const char* verb, const void* address, Site site);

}  // namespace cuemu
