// Allocations, copies and managed memory of the runtime stub.
#include <cstdlib>
#include <cstring>
#include <set>

#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/managed.h"

namespace {

using cuemu::remember;

std::set<void*>& pinned() {
  static std::set<void*> all;
  return all;
}

cudaError_t allocate(void** address, size_t num_bytes) {
  *address = nullptr;
  if (cuemu::is_capturing()) {
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  if (num_bytes == 0) {
    return cudaSuccess;
  }
  if (!cuemu::make_room(num_bytes)) {
    return remember(cudaErrorMemoryAllocation);
  }
  *address = cuemu::allocate_global(num_bytes);
  return cudaSuccess;
}

bool is_device(cudaMemLocation location) { return location.type == cudaMemLocationTypeDevice; }

bool is_known(cudaMemLocation location) {
  return location.type == cudaMemLocationTypeHost || (is_device(location) && location.id == 0);
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** address, size_t num_bytes) { return allocate(address, num_bytes); }

cudaError_t cudaFree(void* address) {
  if (cuemu::is_capturing()) {
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  const bool freed = address == nullptr || cuemu::free_managed(address) || cuemu::free_global(address);
  return remember(freed ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaMallocHost(void** address, size_t num_bytes) {
  *address = std::malloc(num_bytes);
  pinned().insert(*address);
  return *address != nullptr ? cudaSuccess : remember(cudaErrorMemoryAllocation);
}

cudaError_t cudaHostAlloc(void** address, size_t num_bytes, unsigned) { return cudaMallocHost(address, num_bytes); }

cudaError_t cudaFreeHost(void* address) {
  if (pinned().erase(address) == 0) {
    return remember(cudaErrorInvalidValue);
  }
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind, cudaStream_t stream) {
  return remember(cuemu::submit(stream, [to, from, num_bytes] {
    if (num_bytes > 0) {
      std::memcpy(to, from, num_bytes);
    }
    return cudaSuccess;
  }));
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, num_bytes, kind, nullptr);
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t stream) {
  return remember(cuemu::submit(stream, [address, value, num_bytes] {
    if (num_bytes > 0) {
      std::memset(address, value, num_bytes);
    }
    return cudaSuccess;
  }));
}

cudaError_t cudaMemset(void* address, int value, size_t num_bytes) {
  return cudaMemsetAsync(address, value, num_bytes, nullptr);
}

cudaError_t cudaMallocManaged(void** address, size_t num_bytes, unsigned flags) {
  if (cuemu::is_capturing()) {
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  if (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost) {
    return remember(cudaErrorInvalidValue);
  }
  return remember(cuemu::allocate_managed(address, num_bytes));
}

cudaError_t cudaMemPrefetchAsync(const void* address, size_t num_bytes, cudaMemLocation location, unsigned flags,
                                 cudaStream_t stream) {
  if (!is_known(location) || flags != 0) {
    return remember(cudaErrorInvalidValue);
  }
  return remember(cuemu::submit(stream, [address, num_bytes, location, stream] {
    return cuemu::prefetch(address, num_bytes, is_device(location), stream);
  }));
}

cudaError_t cudaMemAdvise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, cudaMemLocation location) {
  if (!is_known(location)) {
    return remember(cudaErrorInvalidValue);
  }
  return remember(cuemu::advise(address, num_bytes, advice, is_device(location)));
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *total_bytes = cuemu::device().total_bytes;
  const size_t used = cuemu::plain_bytes() + cuemu::managed_bytes_on_device();
  *free_bytes = *total_bytes - (used < *total_bytes ? used : *total_bytes);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  *attributes = {};
  auto* pointer = const_cast<void*>(address);
  attributes->device = -2;  // of unregistered memory
  attributes->hostPointer = pointer;
  if (cuemu::is_managed(address)) {
    attributes->type = cudaMemoryTypeManaged;
    attributes->device = 0;
    attributes->devicePointer = pointer;
  } else if (cuemu::is_global(address)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = 0;
    attributes->devicePointer = pointer;
    attributes->hostPointer = nullptr;
  }
  return cudaSuccess;
}

}  // extern "C"
