// Device memory: every allocation has the exact size, red zones around it, and starts as NaN (0xff).
#pragma once

#include <cstddef>
#include <string>

#include "cuda_on_cpu/device.h"

namespace cuemu {

inline constexpr size_t kRedZone = 256;  // bytes on either side, at least

// At a multiple of `alignment` bytes, a power of two: 256, as cudaMalloc gives them, or `offset_bytes` after one.
void* allocate_global(size_t num_bytes, size_t offset_bytes = 0, size_t alignment = kRedZone,
                      int owner = current_device());

// False if `address` is not the start of a live allocation. A kernel that still uses the memory is reported, until many
// later allocations have been freed.
bool free_global(void* address);

// From now on a fault of a kernel ends its launch, not the process. A fiber may have run out of stack, so the handler
// has a stack of its own. The first allocation calls it.
void catch_faults();

size_t allocated_bytes();  // that the current device owns

// Which allocation's red zone was overwritten, in words; empty if none was. After every launch.
std::string overwritten_red_zone();

// Whether device memory is closed to the host, so that its touches are reported (not at the start: closing costs a call
// of the system for each allocation and launch). managed.h opens and closes it around what runs on the device.
void set_closed_to_host(bool closed);
void open_device_memory();
void close_device_memory();
bool report_host_touch(void* address);  // of closed memory, which is open then; false if it is not that

// Copies by tests, which are no touches.
void copy_bytes(void* to, const void* from, size_t num_bytes);
void fill_bytes(void* to, int value, size_t num_bytes);

}  // namespace cuemu
