// The arena in managed memory: the driver keeps one address for pages that move between device and host. For devices
// with concurrent managed access (Linux, not Windows, WSL2 or Tegra); elsewhere pinned_store.h does the same work.
//
// Pages prefer the host and are mapped on the device, so that one that is not there in time, because it was evicted for
// somebody's allocation, is read over the bus and never by a fault. Prefetches bring them before their turn on the
// caller's stream, and take them back on another one.
#pragma once

#include <memory>

#include "cuda/page_store.h"

namespace qlora_native::cuda {

inline constexpr int64_t kManagedPageBytes = int64_t{64} << 10;  // a step of the driver's; it moves up to 2 MiB at once

// False if the driver does not say.
bool has_concurrent_managed_access(int device);

class ManagedStore final : public PageStore {
 public:
  // On the current device; what the arena holds is not defined yet. Null and the error if it cannot be had.
  static std::unique_ptr<ManagedStore> make(std::vector<StateForm> forms, int64_t page_bytes, int64_t chunk_bytes,
                                            cudaError_t& error);
  ~ManagedStore() override;

  cudaError_t zero(int64_t budget_bytes, cudaStream_t stream) override;

 private:
  using PageStore::PageStore;

  std::vector<PageMove> moves_of(const std::vector<bool>& wanted, const std::vector<bool>& resident,
                                 int64_t budget_bytes) const override;
  cudaError_t move_in(int64_t chunk, cudaStream_t stream) override;
  cudaError_t move_out(int64_t chunk, cudaStream_t stream) override;
  cudaError_t prefetch(int64_t chunk, int location, cudaStream_t stream) const;
};

}  // namespace qlora_native::cuda
