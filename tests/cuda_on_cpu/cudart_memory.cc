// Allocations, copies and managed memory of the runtime stub.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>

#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/streams.h"

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

// The runtime waits here for everything, or for what it has recorded to use the memory; code that counts on it is wrong
// on some of its versions.
void report_use(const char* verb) {
  if (const size_t queued = cuemu::num_queued(); queued > 0) {
    cuemu::add_report(std::string(verb) + " while " + std::to_string(queued) +
                      " pieces of work are queued: wait for the streams that use the memory first");
  }
}

// Runs on the device: `work` under the touches of `toucher`.
cudaError_t run_touching(cuemu::Toucher toucher, const std::function<void()>& work) {
  cuemu::enter(toucher);
  work();
  std::string wrong = cuemu::leave();
  if (wrong.empty()) {
    return cudaSuccess;
  }
  cuemu::add_report(std::move(wrong));
  return cudaErrorLaunchFailure;
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
  report_use("cudaFree");
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
  report_use("cudaFreeHost");
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const bool to_host = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost;
  const auto toucher = to_host ? cuemu::Toucher::kCopyToHost : cuemu::Toucher::kCopyToDevice;
  return remember(cuemu::submit(stream, [=] {
    return run_touching(toucher, [=] {
      if (num_bytes > 0) {
        std::memcpy(to, from, num_bytes);
      }
    });
  }));
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind) {
  const cudaError_t error = cudaMemcpyAsync(to, from, num_bytes, kind, nullptr);
  return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t stream) {
  return remember(cuemu::submit(stream, [=] {
    return run_touching(cuemu::Toucher::kDevice, [=] {
      if (num_bytes > 0) {
        std::memset(address, value, num_bytes);
      }
    });
  }));
}

cudaError_t cudaMemset(void* address, int value, size_t num_bytes) {
  const cudaError_t error = cudaMemsetAsync(address, value, num_bytes, nullptr);
  return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
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
