// A step over states that are not all resident: a thread fetches chunks ahead of their turn and releases those behind,
// while the caller's threads update what is there. The thread lives as long as the step, so that a fork finds none.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/page_plan.h"
#include "cpu/files/file_store.h"
#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

// The stores of one optimizer. Not for two threads at a time.
class Pager {
 public:
  // Takes a store in, whose arena `plan` lays out. The plan's tensors are numbered on from those taken in before.
  void add(std::shared_ptr<FileStore> store, const PagePlan& plan);

  // Calls `update` for runs of parts that together cover the tensors of a step. Of what lies in files, no more than
  // budget_bytes are resident at a time. std::invalid_argument if that is less than the largest chunk; PageFileError
  // if a file cannot be read or written: then only some parts were updated.
  void step(const OptimTensor* tensors,       // [num_tensors]
            const int64_t* number_of_tensor,  // [num_tensors] among those taken in; -1: its states lie elsewhere
            int64_t num_tensors, int64_t budget_bytes, const UpdateParts& update);

  void to_file();    // all stores; as FileStore's
  bool to_memory();  // all stores; as FileStore's
  void evict();      // all stores

  const std::vector<int64_t>& numel() const { return numel_; }  // of each tensor taken in
  int64_t num_chunks() const { return static_cast<int64_t>(chunks_.size()); }
  int64_t look_ahead() const { return look_ahead_; }
  // So far: how often an update, or the end of a step, waited for pages, and how long. From any thread.
  int64_t stalls() const { return stalls_; }
  double stall_seconds() const { return stall_seconds_; }

 private:
  struct Chunk {
    FileStore* store;
    std::vector<ByteRange> ranges;
    int64_t first_part;  // of parts_
    int64_t last_part;
    bool resident;
  };

  void drop_what_others_touched(int64_t budget_bytes);
  void walk(const PageWalk& order, const std::vector<std::vector<StatePart>>& parts, const UpdateParts& update);

  std::vector<std::shared_ptr<FileStore>> stores_;
  std::vector<int64_t> numel_;
  std::vector<StatePart> parts_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> sizes_;  // of the chunks, in bytes
  int64_t look_ahead_ = 2;      // chunks; from the second step on, how many updates a fetch takes
  // One thread updates, until that has once taken longer than the transfers: beside a disk, a team mostly waits for
  // its members.
  bool alone_ = true;
  std::atomic<int64_t> stalls_{0};
  std::atomic<double> stall_seconds_{0.0};
};

}  // namespace qlora_native::cpu
