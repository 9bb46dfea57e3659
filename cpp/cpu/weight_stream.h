// Parts of mapped files that come and go beside the computing: a thread reads those that are wanted next and gives up
// those behind. The addresses never change, so whoever is early, or was not foreseen, reads the file by itself. Linux.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cpu/mapped_file.h"
#include "cpu/side_thread.h"

namespace qlora_native::cpu {

struct MappedPart {
  std::shared_ptr<MappedFile> file;
  ByteRange range;
};

using Unit = std::vector<MappedPart>;  // what one layer reads

class WeightStream {
 public:
  // `resident` is read once, when nothing else is wanted, and kept; `rows` are given up at each start of a pass.
  WeightStream(std::vector<Unit> units, Unit resident, Unit rows);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  int64_t num_units() const { return static_cast<int64_t>(units_.size()); }
  // Hold these units, the soonest used first, and no others. Waits for the unit `now`, -1 for none. False if a read
  // failed.
  bool want(std::vector<int64_t> units, int64_t now, bool begins_pass);
  // Returns when all that is wanted is held, and all that is resident was read.
  void settle();

  int64_t bytes_read() const;  // so far, of units that were not held
  int64_t stalls() const;      // how often want() waited
  double stall_seconds() const;
  std::set<int64_t> held() const;

 private:
  void run();
  void read_around(bool allowed) const;
  void fetch(std::unique_lock<std::mutex>& lock, const MappedPart& part);

  const std::vector<Unit> units_;
  const Unit resident_;
  const Unit rows_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // what is wanted, or that it ends
  std::condition_variable moved_;    // what is held
  std::vector<int64_t> wanted_;
  std::set<int64_t> held_;
  size_t resident_read_ = 0;  // parts
  bool begins_pass_ = false;
  bool failed_ = false;
  bool ends_ = false;
  int64_t bytes_read_ = 0;
  int64_t stalls_ = 0;
  double stall_seconds_ = 0;
  std::unique_ptr<SideThread> thread_;
};

}  // namespace qlora_native::cpu
