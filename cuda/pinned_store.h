// The arena in pinned host memory, for devices whose managed memory cannot move under a running kernel (Windows, WSL2,
// Tegra): the states are host memory, and each chunk is copied to one of two buffers on the device, updated there, and
// copied back. Copies run on streams of their own: chunk i + 1 comes and chunk i - 1 goes while chunk i is updated.
#pragma once

#include <memory>

#include "cuda/page_store.h"

namespace qlora_native::cuda {

// A copy in may start when the copy out of the chunk before last is done, which runs beside the last copy in: with two
// buffers both directions of the bus are busy.
inline constexpr int64_t kStagingBuffers = 2;
inline constexpr int64_t kPinnedPageBytes = 4096;  // copies need no pages; chunks stay apart

class PinnedStore final : public PageStore {
 public:
  // On the current device, with any bytes until zero(). Null and the error if the memory cannot be had.
  static std::unique_ptr<PinnedStore> make(std::vector<StateForm> forms, int64_t page_bytes, int64_t chunk_bytes,
                                           cudaError_t& error);
  ~PinnedStore() override;

  // Of the device, for the buffers, which belong to the caller's stream.
  int64_t staging_bytes() const { return kStagingBuffers * largest_chunk(); }

  // Where the chunks of a walk go: those that are updated, in order, by turns to the buffers at `staging`,
  // [staging_bytes()]. A walk with other wanted chunks needs another one.
  class Staging {
   public:
    Staging(const PinnedStore& store, std::byte* staging) : store_(store), staging_(staging) {}

    // To be asked in the order of the chunks.
    uintptr_t address_of(int64_t chunk, int64_t offset);
    const std::vector<std::byte*>& buffers() const { return buffers_; }  // [chunks] null for those not asked for

   private:
    const PinnedStore& store_;
    std::byte* staging_;
    std::vector<std::byte*> buffers_;
    int64_t turn_ = 0;
  };

  // Before a walk: where its chunks go, from a Staging.
  void use(std::vector<std::byte*> buffers) { buffers_ = std::move(buffers); }

  cudaError_t zero(int64_t budget_bytes, cudaStream_t stream) override;

 private:
  using PageStore::PageStore;

  std::vector<PageMove> moves_of(const std::vector<bool>& wanted, const std::vector<bool>& resident,
                                 int64_t budget_bytes) const override;
  cudaError_t move_in(int64_t chunk, cudaStream_t stream) override;
  cudaError_t move_out(int64_t chunk, cudaStream_t stream) override;

  std::vector<std::byte*> buffers_;  // [chunks]
};

}  // namespace qlora_native::cuda
