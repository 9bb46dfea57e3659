// Managed memory: which pages lie on the device and which on the host, by what was asked for. A kernel's own accesses
// migrate nothing here; tests hold prefetches, advice and evictions to what they should be.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
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
};

struct Residency {
  size_t device_bytes, host_bytes;  // whole pages; pages that were never touched count for neither
};

cudaError_t allocate_managed(void** address, size_t num_bytes);
bool free_managed(void* address);
bool is_managed(const void* address);

cudaError_t prefetch(const void* address, size_t num_bytes, bool to_device, cudaStream_t stream);
cudaError_t advise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, bool device_location);

// Moves pages of managed memory to the host, those that came longest ago first, until `num_bytes` of the device are
// free. False if plain allocations alone leave less.
bool make_room(size_t num_bytes);

Residency residency(const void* address);  // of the allocation that begins there
size_t plain_bytes();                      // of allocations that are not managed
size_t managed_bytes_on_device();
size_t evicted_bytes();  // so far
std::vector<ManagedCall> take_managed_calls();

}  // namespace cuemu
