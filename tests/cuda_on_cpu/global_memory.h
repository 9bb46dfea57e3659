// Device memory: every allocation has the exact size, red zones around it, and starts as NaN (0xff). Pointers that no
// allocation here gave out (a CPU tensor handed to a kernel) are let pass; AddressSanitizer sees those.
#pragma once

#include <cstddef>
#include <string>

#include "cuda_on_cpu/site.h"

namespace cuemu {

inline constexpr size_t kRedZone = 256;  // bytes on either side, at least

// At a multiple of `alignment` bytes, a power of two: 256, as cudaMalloc gives them, or `offset_bytes` after one.
void* allocate_global(size_t num_bytes, size_t offset_bytes = 0, size_t alignment = kRedZone);

// False if `address` is not the start of a live allocation.
bool free_global(void* address);

// Whether `address` lies in a live allocation.
bool is_global(const void* address);

size_t allocated_bytes();

// Error if the bytes reach out of the allocation that they begin in, lie in a red zone, or were freed.
void check_global(const void* address, size_t num_bytes, const char* verb, Site site);

// Which allocation's red zone was overwritten, in words; empty if none was. After every launch.
std::string overwritten_red_zone();

}  // namespace cuemu
