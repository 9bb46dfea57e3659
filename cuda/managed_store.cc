#include "cuda/managed_store.h"

#include <utility>

namespace qlora_native::cuda {
namespace {

// A location is a device's number or cudaCpuDeviceId, as CUDA 12 takes them; CUDA 13 asks for more words.
#if CUDART_VERSION >= 13000

cudaMemLocation words_of(int location) {
  if (location == cudaCpuDeviceId) {
    return {cudaMemLocationTypeHost, 0};
  }
  return {cudaMemLocationTypeDevice, location};
}

cudaError_t prefetch_to(int location, const void* address, size_t num_bytes, cudaStream_t stream) {
  return cudaMemPrefetchAsync(address, num_bytes, words_of(location), 0, stream);
}

cudaError_t advise(int location, const void* address, size_t num_bytes, cudaMemoryAdvise advice) {
  return cudaMemAdvise(address, num_bytes, advice, words_of(location));
}

#else

cudaError_t prefetch_to(int location, const void* address, size_t num_bytes, cudaStream_t stream) {
  return cudaMemPrefetchAsync(address, num_bytes, location, stream);
}

cudaError_t advise(int location, const void* address, size_t num_bytes, cudaMemoryAdvise advice) {
  return cudaMemAdvise(address, num_bytes, advice, location);
}

#endif

}  // namespace

bool has_concurrent_managed_access(int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrConcurrentManagedAccess, device);
  (void)cudaGetLastError();
  return error == cudaSuccess && value != 0;
}

std::unique_ptr<ManagedStore> ManagedStore::make(std::vector<StateForm> forms, int64_t page_bytes, int64_t chunk_bytes,
                                                 cudaError_t& error) {
  PagePlan plan = plan_pages(forms, page_bytes, chunk_bytes);
  const auto num_bytes = static_cast<size_t>(plan.num_bytes);
  std::unique_ptr<ManagedStore> store(new ManagedStore(std::move(forms), std::move(plan)));
  error = store->open(false);
  if (error == cudaSuccess && num_bytes > 0) {
    void* memory = nullptr;
    error = cudaMallocManaged(&memory, num_bytes, cudaMemAttachGlobal);
    store->memory_ = static_cast<std::byte*>(memory);
    if (error == cudaSuccess) {
      error = advise(cudaCpuDeviceId, memory, num_bytes, cudaMemAdviseSetPreferredLocation);
    }
    if (error == cudaSuccess) {
      error = advise(store->device_, memory, num_bytes, cudaMemAdviseSetAccessedBy);
    }
  }
  return error == cudaSuccess ? std::move(store) : nullptr;
}

ManagedStore::~ManagedStore() {
  if (memory_ != nullptr) {
    wait_for_device();
    (void)cudaFree(memory_);
  }
}

std::vector<PageMove> ManagedStore::moves_of(const std::vector<bool>& wanted, const std::vector<bool>& resident,
                                             int64_t budget_bytes) const {
  return plan_walk(sizes(), wanted, resident, budget_bytes, kLookAhead).moves;
}

cudaError_t ManagedStore::prefetch(int64_t chunk, int location, cudaStream_t stream) const {
  cudaError_t error = cudaSuccess;
  for (const ByteRange& range : plan().chunks[static_cast<size_t>(chunk)].ranges) {
    if (error == cudaSuccess) {
      error = prefetch_to(location, memory_ + range.begin, static_cast<size_t>(range.size()), stream);
    }
  }
  return error;
}

cudaError_t ManagedStore::move_in(int64_t chunk, cudaStream_t stream) { return prefetch(chunk, device_, stream); }

cudaError_t ManagedStore::move_out(int64_t chunk, cudaStream_t stream) {
  return prefetch(chunk, cudaCpuDeviceId, stream);
}

cudaError_t ManagedStore::zero(int64_t budget_bytes, cudaStream_t stream) {
  const auto clear = [&](int64_t chunk) {
    cudaError_t error = cudaSuccess;
    for (const ByteRange& range : plan().chunks[static_cast<size_t>(chunk)].ranges) {
      if (error == cudaSuccess) {
        error = cudaMemsetAsync(memory_ + range.begin, 0, static_cast<size_t>(range.size()), stream);
      }
    }
    return error;
  };
  return walk(std::vector<bool>(sizes().size(), true), budget_bytes, clear, stream);
}

}  // namespace qlora_native::cuda
