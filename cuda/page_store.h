// An arena of optimizer states of which only some chunks of pages are on the device, and the step that goes over it:
// chunk after chunk is fetched, updated and released, so that the next one comes and the last one goes while one is
// updated. The host waits for nothing in a step.
//
// Three streams take part: the caller's, on which chunks are updated; one on which they come; one on which they go.
// Events order them: an update waits for its fetch, a release for its update, and a fetch for the releases before it,
// so that what is on the device stays within the budget.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "core/page_plan.h"

namespace qlora_native::cuda {

// Chunks fetched before their turn. An update reads and writes device memory 20 to 100 times as fast as the bus brings
// the chunk, so that the bus never idles with one under way; more would take room and gain nothing.
inline constexpr int64_t kLookAhead = 1;

struct PageStatistics {
  int64_t num_bytes;       // of the arena
  int64_t resident_bytes;  // on the device, by what was asked for
  int64_t bytes_in;        // asked to the device so far
  int64_t bytes_out;       // and back
};

class PageStore {
 public:
  // Launches the update of a chunk on the caller's stream.
  using Update = std::function<cudaError_t(int64_t chunk)>;

  PageStore(const PageStore&) = delete;
  PageStore& operator=(const PageStore&) = delete;
  virtual ~PageStore();

  const std::vector<StateForm>& forms() const { return forms_; }
  const PagePlan& plan() const { return plan_; }
  std::byte* memory() const { return memory_; }  // [plan().num_bytes]

  // Least residency budget that walk() takes.
  int64_t largest_chunk() const { return largest_; }

  // Every wanted chunk once. std::invalid_argument if the budget is less than the largest chunk.
  cudaError_t walk(const std::vector<bool>& wanted,  // [chunks]
                   int64_t budget_bytes, const Update& update, cudaStream_t stream);

  // Asks for all chunks.
  cudaError_t page_in(cudaStream_t stream);
  bool is_resident() const;  // all of it, by what was asked for

  // Asks again for the chunks that were asked for: an allocation may have evicted some, which CUDA does not report.
  // Those that are there do not move.
  cudaError_t renew(cudaStream_t stream);

  // On the current device: sends every chunk away after what `stream` holds, and returns when they are gone.
  cudaError_t page_out(cudaStream_t stream);

  // Sets every byte to 0, chunk by chunk.
  virtual cudaError_t zero(int64_t budget_bytes, cudaStream_t stream) = 0;

  // Returns when nothing moves: before the host reads the arena.
  cudaError_t finish();

  // Somebody else may have moved pages: asks for every chunk anew.
  void forget_residency();

  PageStatistics statistics() const;

 protected:
  PageStore(std::vector<StateForm> forms, PagePlan plan);

  // For the current device. `comes_apart`: chunks come on a stream of their own, else on the caller's.
  cudaError_t open(bool comes_apart);

  // Waits for the device: whatever uses the arena may still run. To be called by the destructors of what derives,
  // before they free it.
  void wait_for_device() const;

  virtual std::vector<PageMove> moves_of(const std::vector<bool>& wanted,    // [chunks]
                                         const std::vector<bool>& resident,  // [chunks]
                                         int64_t budget_bytes) const = 0;
  virtual cudaError_t move_in(int64_t chunk, cudaStream_t stream) = 0;
  virtual cudaError_t move_out(int64_t chunk, cudaStream_t stream) = 0;

  const std::vector<int64_t>& sizes() const { return sizes_; }  // [chunks] bytes

  int device_ = 0;
  std::byte* memory_ = nullptr;

 private:
  // Streams and events, at the first move: a store may be memory alone.
  cudaError_t make_streams();
  cudaError_t move(const PageMove& next, const Update& update, cudaStream_t stream);
  cudaError_t fetch(size_t chunk, cudaStream_t stream);
  cudaError_t release(size_t chunk);

  std::vector<StateForm> forms_;
  PagePlan plan_;
  std::vector<int64_t> sizes_;  // [chunks] bytes
  int64_t largest_ = 0;
  mutable std::mutex mutex_;
  std::vector<bool> resident_;  // [chunks]
  int64_t bytes_in_ = 0;
  int64_t bytes_out_ = 0;
  bool comes_apart_ = false;
  cudaStream_t in_ = nullptr;  // null: the caller's
  cudaStream_t out_ = nullptr;
  cudaEvent_t began_ = nullptr;
  cudaEvent_t released_ = nullptr;
  std::vector<cudaEvent_t> fetched_;  // [chunks]
  std::vector<cudaEvent_t> updated_;  // [chunks]
};

}  // namespace qlora_native::cuda
