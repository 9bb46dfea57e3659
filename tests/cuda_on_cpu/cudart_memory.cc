// Allocations, copies and managed memory of the runtime stub.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>

#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/capture.h"
#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/streams.h"

namespace {

using cuemu::remember;

// The runtime waits here for everything, or for what it has recorded to use the memory; code that counts on it is wrong
// on some of its versions.
void report_use(const char* verb) {
  if (const size_t queued = cuemu::num_queued(); queued > 0) {
    cuemu::add_report(std::string(verb) + " while " + std::to_string(queued) +
                      " pieces of work are queued: wait for the streams that use the memory first");
  }
}

struct Bytes {
  const void* address;
  size_t num_bytes;
};

// Runs on the device: `work` on these bytes, under the touches of `toucher`.
cudaError_t run_touching(cuemu::Toucher toucher, std::initializer_list<Bytes> all, const std::function<void()>& work) {
  for (const Bytes& bytes : all) {
    if (std::string wrong = cuemu::wrong_bytes(bytes.address, bytes.num_bytes); !wrong.empty()) {
      cuemu::add_report("a copy or memset of " + wrong);
      return cuemu::keep_error(cuemu::current_device(), cudaErrorIllegalAddress);
    }
  }
  cuemu::enter(toucher);
  work();
  std::string wrong = cuemu::leave();
  if (wrong.empty()) {
    return cudaSuccess;
  }
  cuemu::add_report(std::move(wrong));
  return cuemu::keep_error(cuemu::current_device(), cudaErrorLaunchFailure);
}

bool is_device(cudaMemLocation location) { return location.type == cudaMemLocationTypeDevice; }

bool is_known(cudaMemLocation location) {
  return location.type == cudaMemLocationTypeHost ||
         (is_device(location) && location.id >= 0 && location.id < cuemu::num_devices());
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** address, size_t num_bytes) {
  CUEMU_REQUIRE_CONTEXT();
  *address = nullptr;
  if (const cudaError_t refusal = cuemu::refuse_unsafe(); refusal != cudaSuccess) {
    return remember(refusal);
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

cudaError_t cudaFree(void* address) {
  CUEMU_REQUIRE_CONTEXT();
  if (const cudaError_t refusal = cuemu::refuse_unsafe(); refusal != cudaSuccess) {
    return remember(refusal);
  }
  report_use("cudaFree");
  const bool freed = address == nullptr || cuemu::free_managed(address) || cuemu::free_global(address);
  return remember(freed ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaMallocHost(void** address, size_t num_bytes) {
  CUEMU_REQUIRE_CONTEXT();
  if (const cudaError_t refusal = cuemu::refuse_unsafe(); refusal != cudaSuccess) {
    return remember(refusal);
  }
  *address = std::malloc(num_bytes);
  if (*address == nullptr) {
    return remember(cudaErrorMemoryAllocation);
  }
  std::memset(*address, 0xff, num_bytes);  // NaN, as all memory that nobody wrote
  cuemu::add_range(*address, num_bytes, cuemu::Kind::kPinned);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t num_bytes, unsigned) { return cudaMallocHost(address, num_bytes); }

cudaError_t cudaFreeHost(void* address) {
  CUEMU_REQUIRE_CONTEXT();
  const cuemu::Range* range = cuemu::range_of(address);
  if (range == nullptr || range->kind != cuemu::Kind::kPinned || address != reinterpret_cast<void*>(range->begin)) {
    return remember(cudaErrorInvalidValue);
  }
  report_use("cudaFreeHost");
  cuemu::forget_range(address);
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  const bool to_host = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost;
  const auto toucher = to_host ? cuemu::Toucher::kCopyToHost : cuemu::Toucher::kCopyToDevice;
  return remember(cuemu::submit(stream, [=] {
    return run_touching(toucher, {{to, num_bytes}, {from, num_bytes}}, [=] {
      if (num_bytes > 0) {
        std::memcpy(to, from, num_bytes);
      }
    });
  }));
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind) {
  CUEMU_REQUIRE_CONTEXT();
  const cudaError_t error = cudaMemcpyAsync(to, from, num_bytes, kind, nullptr);
  return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  return remember(cuemu::submit(stream, [=] {
    return run_touching(cuemu::Toucher::kDevice, {{address, num_bytes}}, [=] {
      if (num_bytes > 0) {
        std::memset(address, value, num_bytes);
      }
    });
  }));
}

cudaError_t cudaMemset(void* address, int value, size_t num_bytes) {
  CUEMU_REQUIRE_CONTEXT();
  const cudaError_t error = cudaMemsetAsync(address, value, num_bytes, nullptr);
  return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

cudaError_t cudaMallocManaged(void** address, size_t num_bytes, unsigned flags) {
  CUEMU_REQUIRE_CONTEXT();
  if (const cudaError_t refusal = cuemu::refuse_unsafe(); refusal != cudaSuccess) {
    return remember(refusal);
  }
  if (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost) {
    return remember(cudaErrorInvalidValue);
  }
  return remember(cuemu::allocate_managed(address, num_bytes));
}

cudaError_t cudaMemPrefetchAsync(const void* address, size_t num_bytes, cudaMemLocation location, unsigned flags,
                                 cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  if (!is_known(location) || flags != 0) {
    return remember(cudaErrorInvalidValue);
  }
  if (cuemu::is_captured(stream)) {
    return remember(cuemu::refuse_wait(stream));  // a graph has no such node
  }
  return remember(cuemu::submit(stream, [address, num_bytes, location, stream] {
    return cuemu::prefetch(address, num_bytes, is_device(location), stream);
  }));
}

cudaError_t cudaMemAdvise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, cudaMemLocation location) {
  CUEMU_REQUIRE_CONTEXT();
  if (!is_known(location)) {
    return remember(cudaErrorInvalidValue);
  }
  return remember(cuemu::advise(address, num_bytes, advice, is_device(location)));
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  CUEMU_REQUIRE_CONTEXT();
  *total_bytes = cuemu::device().total_bytes;
  const size_t used = cuemu::allocated_bytes() + cuemu::managed_bytes_on_device();
  *free_bytes = *total_bytes - (used < *total_bytes ? used : *total_bytes);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  CUEMU_REQUIRE_CONTEXT();
  *attributes = {};
  auto* pointer = const_cast<void*>(address);
  attributes->device = -2;  // of unregistered memory
  attributes->hostPointer = pointer;
  const cuemu::Range* range = cuemu::range_of(address);
  if (range == nullptr || range->kind == cuemu::Kind::kHost || range->kind == cuemu::Kind::kFreed) {
    return cudaSuccess;
  }
  const bool is_device = range->kind == cuemu::Kind::kDevice;
  attributes->type = is_device                              ? cudaMemoryTypeDevice
                     : range->kind == cuemu::Kind::kManaged ? cudaMemoryTypeManaged
                                                            : cudaMemoryTypeHost;
  attributes->device = is_device ? range->owner : 0;
  attributes->devicePointer = pointer;
  attributes->hostPointer = is_device ? nullptr : pointer;
  return cudaSuccess;
}

}  // extern "C"
