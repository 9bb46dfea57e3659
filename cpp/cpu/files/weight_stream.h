// Parts of mapped files that come and go beside the computing: a thread reads those that are wanted next and gives up
// those behind. The addresses never change, so whoever is early, or was not foreseen, reads the file by itself. A
// forked child, which has the parent's parts and not its thread, starts a thread of its own when it asks for something.
// Linux.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "cpu/files/mapped_file.h"

namespace qlora_native::cpu {

struct MappedPart {
  std::shared_ptr<MappedFile> file;
  ByteRange range;
};

using Unit = std::vector<MappedPart>;  // what one layer reads

// Any thread may call any method.
class WeightStream {
 public:
  // `resident` is read once, when nothing else is wanted, and kept; `rows` are given up at each start of a pass.
  WeightStream(std::vector<Unit> units, Unit resident, Unit rows);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  int64_t num_units() const { return static_cast<int64_t>(units_.size()); }
  // Hold these units, the soonest used first, and no others. Waits for the unit `now`, one of them, or -1 for none; no
  // longer, once another thread wants others. False if a read failed.
  bool want(std::vector<int64_t> units, int64_t now, bool begins_pass);
  // Returns when all that is wanted is held, and all that is resident was read.
  void settle();

  // Of this process, so far.
  int64_t bytes_read() const;  // of units that were not held
  int64_t stalls() const;      // how often want() waited
  double stall_seconds() const;
  std::set<int64_t> held() const;

 private:
  class Reader;

  Reader& reader() const;
  void read_around(bool allowed) const;

  const std::vector<Unit> units_;
  const Unit resident_;
  const Unit rows_;
  mutable std::atomic<Reader*> reader_{nullptr};  // of this process, or still the parent's
};

}  // namespace qlora_native::cpu
