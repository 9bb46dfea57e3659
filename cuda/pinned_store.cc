#include "cuda/pinned_store.h"

#include <cstring>
#include <utility>

namespace qlora_native::cuda {

std::unique_ptr<PinnedStore> PinnedStore::make(std::vector<StateForm> forms, int64_t page_bytes, int64_t chunk_bytes,
                                               cudaError_t& error) {
  PagePlan plan = plan_pages(forms, page_bytes, chunk_bytes);
  const auto num_bytes = static_cast<size_t>(plan.num_bytes);
  std::unique_ptr<PinnedStore> store(new PinnedStore(std::move(forms), std::move(plan)));
  error = store->open(true);
  if (error == cudaSuccess && num_bytes > 0) {
    void* memory = nullptr;
    error = cudaHostAlloc(&memory, num_bytes, cudaHostAllocDefault);
    store->memory_ = static_cast<std::byte*>(memory);
  }
  return error == cudaSuccess ? std::move(store) : nullptr;
}

PinnedStore::~PinnedStore() {
  if (memory_ != nullptr) {
    wait_for_device();
    (void)cudaFreeHost(memory_);
  }
}

uintptr_t PinnedStore::Staging::address_of(int64_t chunk, int64_t offset) {
  buffers_.resize(store_.plan().chunks.size());
  std::byte*& buffer = buffers_[static_cast<size_t>(chunk)];
  if (buffer == nullptr) {
    buffer = staging_ + turn_++ % kStagingBuffers * store_.largest_chunk();
  }
  int64_t at = 0;
  for (const ByteRange& range : store_.plan().chunks[static_cast<size_t>(chunk)].ranges) {
    if (offset >= range.begin && offset < range.end) {
      at += offset - range.begin;
      break;
    }
    at += range.size();
  }
  return reinterpret_cast<uintptr_t>(buffer) + static_cast<uintptr_t>(at);
}

cudaError_t PinnedStore::zero(int64_t /*budget_bytes*/, cudaStream_t /*stream*/) {
  const cudaError_t error = finish();
  if (error == cudaSuccess) {
    std::memset(memory(), 0, static_cast<size_t>(plan().num_bytes));
  }
  return error;
}

// A chunk leaves its buffer as soon as it is updated; the fetch after that waits for it.
std::vector<PageMove> PinnedStore::moves_of(const std::vector<bool>& wanted, const std::vector<bool>& /*resident*/,
                                            int64_t /*budget_bytes*/) const {
  std::vector<int64_t> order;
  for (size_t chunk = 0; chunk < wanted.size(); ++chunk) {
    if (wanted[chunk]) {
      order.push_back(static_cast<int64_t>(chunk));
    }
  }
  std::vector<PageMove> moves;
  for (size_t i = 0; i < order.size(); ++i) {
    if (i == 0) {
      moves.push_back({PageAction::kFetch, order[0]});
    }
    if (i + 1 < order.size()) {
      moves.push_back({PageAction::kFetch, order[i + 1]});
    }
    moves.push_back({PageAction::kUpdate, order[i]});
    moves.push_back({PageAction::kRelease, order[i]});
  }
  return moves;
}

cudaError_t PinnedStore::move_in(int64_t chunk, cudaStream_t stream) {
  std::byte* buffer = buffers_[static_cast<size_t>(chunk)];
  for (const ByteRange& range : plan().chunks[static_cast<size_t>(chunk)].ranges) {
    const auto size = static_cast<size_t>(range.size());
    const cudaError_t error = cudaMemcpyAsync(buffer, memory_ + range.begin, size, cudaMemcpyHostToDevice, stream);
    if (error != cudaSuccess) {
      return error;
    }
    buffer += range.size();
  }
  return cudaSuccess;
}

cudaError_t PinnedStore::move_out(int64_t chunk, cudaStream_t stream) {
  const std::byte* buffer = buffers_[static_cast<size_t>(chunk)];
  for (const ByteRange& range : plan().chunks[static_cast<size_t>(chunk)].ranges) {
    const auto size = static_cast<size_t>(range.size());
    const cudaError_t error = cudaMemcpyAsync(memory_ + range.begin, buffer, size, cudaMemcpyDeviceToHost, stream);
    if (error != cudaSuccess) {
      return error;
    }
    buffer += range.size();
  }
  return cudaSuccess;
}

}  // namespace qlora_native::cuda
