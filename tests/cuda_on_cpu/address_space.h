// What kernels may address. An access of anything else (malloc's memory, a host thread's stack, freed memory, memory of
// another device) is an error that names the address and what lies there. In the `race` build that is every access, in
// the others those through wp::, __ldg and its kin, and atomics; what they let pass faults or does not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/site.h"

namespace cuemu {

// kHost: what may not be accessed although it is known.
enum class Kind : uint8_t { kDevice, kManaged, kPinned, kHost, kFreed };

struct Range {
  uintptr_t begin;
  size_t num_bytes;
  Kind kind;
  int owner;                    // of kDevice
  uint32_t* writers = nullptr;  // [num_bytes], visibility.h
  uint32_t written_in = 0;      // the launch that `writers` tells of
};

// Replaces what was known of the bytes.
void add_range(const void* address, size_t num_bytes, Kind kind, int owner = kEveryDevice);
void forget_range(const void* address);  // that begins there

// Whether addresses that nothing here knows are errors, as at the start, or are let pass.
void set_strict(bool strict);

// The launch that is about to run: its device, and where its parameters and the call lie.
void begin_addresses(int ordinal, const void* parameters, size_t num_parameter_bytes, const void* call,
                     size_t num_call_bytes);

// Error unless the running thread may access all of the bytes, which are not of shared memory.
void check_global(const void* address, size_t num_bytes, Access access, const char* verb, Where where);

// Why a copy or a memset cannot have these bytes, in words; empty if it can.
std::string wrong_bytes(const void* address, size_t num_bytes);

const Range* range_of(const void* address);  // null if it lies in none

// Ends the launch because of an address that faulted, if a kernel runs.
void fail_fault(const void* address, Where where);

}  // namespace cuemu
