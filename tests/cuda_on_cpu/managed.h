// Managed memory: where each page lies, and what moved it there. Every touch of a page counts, whoever makes it and in
// every build: pages are closed to the processor at the begin and the end of whatever runs on the device, and the first
// access of each one faults. See docs/cuda-on-cpu.md.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuemu {

inline constexpr size_t kManagedPage = 64 * 1024;  // bytes

struct ManagedCall {
  enum class Kind : uint8_t { kPrefetch, kAdvise };
  Kind kind;
  const void* address;
  size_t num_bytes;
  bool to_device;           // else the host
  cudaMemoryAdvise advice;  // of kAdvise
  cudaStream_t stream;      // of kPrefetch
  uint64_t launches;        // how many had begun before it, since the emulator started
};

struct Residency {
  size_t device_bytes, host_bytes;  // whole pages; pages that were never touched count for neither
};

// In pages, since the counters were last taken. Within one launch a page is touched once, and once more each time that
// it has been moved away.
struct ManagedCounters {
  uint64_t device_faults = 0;    // touched by a kernel while not on the device: each stalls the kernel
  uint64_t remote_accesses = 0;  // touched by a kernel on the host, where it stayed: its bytes crossed the bus
  uint64_t host_faults = 0;      // touched by the host while on the device: each stalls the host
  uint64_t to_device = 0;        // moved there by a prefetch or a fault; never-touched pages count as moved
  uint64_t to_host = 0;          // moved there by a prefetch, a fault or an eviction
  uint64_t evicted = 0;          // of to_host
  uint64_t idle_prefetches = 0;  // pages that were where a prefetch was to bring them
  uint64_t most_to_device = 0;   // of the page that was moved there most often
  uint64_t most_to_host = 0;

  bool operator==(const ManagedCounters&) const = default;
};

// What is running decides whose touches pages feel.
enum class Toucher : uint8_t {
  kHost,
  kDevice,        // a kernel or a memset
  kCopyToDevice,  // a copy reads and writes pages where they lie; those never touched arise where it leads
  kCopyToHost,
  kInspector,  // reads bytes on behalf of the emulator: nothing moves
};

cudaError_t allocate_managed(void** address, size_t num_bytes);
bool free_managed(void* address);

cudaError_t prefetch(const void* address, size_t num_bytes, bool to_device, cudaStream_t stream);
cudaError_t advise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, bool device_location);

// Until leave(), touches are this one's. leave() gives what was done to memory that had been freed, in words.
void enter(Toucher toucher);
std::string leave();

// From now on a touch of device memory by the host is reported, or not (as at the start); global_memory.h.
void close_to_host(bool closed);

// Moves pages of managed memory to the host, those that came longest ago first, until `num_bytes` of the device are
// free. False if plain allocations alone leave less.
bool make_room(size_t num_bytes);

Residency residency(const void* address);  // of the allocation that begins there
size_t managed_bytes_on_device();
ManagedCounters take_managed_counters();
std::vector<ManagedCall> take_managed_calls();

}  // namespace cuemu
