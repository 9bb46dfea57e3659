#include "cpu/files/paging.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <utility>

#include "cpu/files/side_thread.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kMostAhead = 4;  // chunks
constexpr int64_t kNoMoreThreads = int64_t{1} << 60;

class Clock {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// What the two threads of a step tell each other.
class Progress {
 public:
  explicit Progress(size_t num_chunks) : fetched_(num_chunks), updated_(num_chunks) {}

  void set_fetched(int64_t chunk) {
    const std::lock_guard lock(mutex_);
    fetched_[static_cast<size_t>(chunk)] = true;
    changed_.notify_all();
  }

  void set_updated(int64_t chunk) {
    const std::lock_guard lock(mutex_);
    updated_[static_cast<size_t>(chunk)] = true;
    news_.push_back(chunk);
    changed_.notify_all();
  }

  // The chunks that were updated since the last call.
  std::vector<int64_t> take_updated() {
    const std::lock_guard lock(mutex_);
    return std::exchange(news_, {});
  }

  // They return the seconds waited; rethrow() then shows whether the wait was in vain.
  double wait_fetched(int64_t chunk) { return wait(fetched_, chunk); }
  double wait_updated(int64_t chunk) { return wait(updated_, chunk); }

  void fail() {
    const std::lock_guard lock(mutex_);
    error_ = error_ ? error_ : std::current_exception();
    changed_.notify_all();
  }

  void rethrow() {
    const std::lock_guard lock(mutex_);
    if (error_) {
      std::rethrow_exception(error_);
    }
  }

 private:
  double wait(const std::vector<bool>& flags, int64_t chunk) {
    std::unique_lock lock(mutex_);
    if (error_ || flags[static_cast<size_t>(chunk)]) {
      return 0.0;
    }
    const Clock clock;
    changed_.wait(lock, [&] { return error_ || flags[static_cast<size_t>(chunk)]; });
    return clock.seconds();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> fetched_;
  std::vector<bool> updated_;
  std::vector<int64_t> news_;
  std::exception_ptr error_;
};

}  // namespace

void Pager::add(std::shared_ptr<FileStore> store, const PagePlan& plan) {
  const auto tensors = static_cast<int64_t>(numel_.size());
  const auto parts = static_cast<int64_t>(parts_.size());
  numel_.resize(numel_.size() + plan.places.size());
  for (const StatePart& part : plan.parts) {
    parts_.push_back({part.tensor + tensors, part.begin, part.end});
    numel_[static_cast<size_t>(part.tensor + tensors)] = part.end;
  }
  for (const PageChunk& chunk : plan.chunks) {
    chunks_.push_back({store.get(), chunk.ranges, chunk.first_part + parts, chunk.last_part + parts, false});
    sizes_.push_back(chunk.num_bytes);
  }
  stores_.push_back(std::move(store));
}

void Pager::step(const OptimTensor* tensors, const int64_t* number_of_tensor, int64_t num_tensors, int64_t budget_bytes,
                 const UpdateParts& update) {
  std::vector<int64_t> row_of(numel_.size(), -1);
  std::vector<StatePart> elsewhere;
  for (int64_t row = 0; row < num_tensors; ++row) {
    if (number_of_tensor[row] < 0) {
      elsewhere.push_back({row, 0, tensors[row].numel});
    } else {
      row_of[static_cast<size_t>(number_of_tensor[row])] = row;
    }
  }
  std::vector<std::vector<StatePart>> parts(chunks_.size());
  std::vector<bool> wanted;
  std::vector<bool> resident;
  for (size_t c = 0; c < chunks_.size(); ++c) {
    for (int64_t p = chunks_[c].first_part; p < chunks_[c].last_part; ++p) {
      const StatePart& part = parts_[static_cast<size_t>(p)];
      const int64_t row = row_of[static_cast<size_t>(part.tensor)];
      if (row >= 0) {
        parts[c].push_back({row, part.begin, part.end});
      }
    }
    wanted.push_back(!parts[c].empty());
    resident.push_back(chunks_[c].resident);
  }
  const auto in_file = [](const auto& store) { return store->bytes_in_file() > 0; };
  const PageWalk order = std::any_of(stores_.begin(), stores_.end(), in_file)
                             ? plan_walk(sizes_, wanted, resident, budget_bytes, look_ahead_)
                             : PageWalk{};
  const auto moves = [](const PageMove& move) { return move.action != PageAction::kUpdate; };
  if (std::none_of(order.moves.begin(), order.moves.end(), moves)) {
    update_in_one_run(tensors, num_tensors, update);
    return;
  }
  drop_what_others_touched(budget_bytes);
  update(elsewhere.data(), static_cast<int64_t>(elsewhere.size()), kUpdateGrain);
  walk(order, parts, update);
}

// Saving a checkpoint reads all states back, in large pages that know nothing of chunks: neighbors go together.
void Pager::drop_what_others_touched(int64_t budget_bytes) {
  int64_t resident = 0;
  for (const auto& store : stores_) {
    resident += store->resident_bytes();
  }
  if (resident <= budget_bytes) {
    return;
  }
  for (const auto& store : stores_) {
    std::vector<ByteRange> ranges;
    for (const Chunk& chunk : chunks_) {
      if (chunk.store == store.get() && !chunk.resident) {
        ranges.insert(ranges.end(), chunk.ranges.begin(), chunk.ranges.end());
      }
    }
    std::sort(ranges.begin(), ranges.end(), [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
    std::vector<ByteRange> joined;
    for (const ByteRange& range : ranges) {
      if (!joined.empty() && range.begin == joined.back().end) {
        joined.back().end = range.end;
      } else {
        joined.push_back(range);
      }
    }
    store->drop(joined);
  }
}

void Pager::walk(const PageWalk& order, const std::vector<std::vector<StatePart>>& parts, const UpdateParts& update) {
  Progress progress(chunks_.size());
  std::vector<bool> is_fetched(chunks_.size());
  for (const PageMove& move : order.moves) {
    is_fetched[static_cast<size_t>(move.chunk)] =
        is_fetched[static_cast<size_t>(move.chunk)] || move.action == PageAction::kFetch;
  }
  double fetch_seconds = 0.0;
  double update_seconds = 0.0;
  int64_t fetches = 0;
  int64_t updates = 0;
  const auto transfer = [&](const PageMove& move) {
    Chunk& chunk = chunks_[static_cast<size_t>(move.chunk)];
    for (const int64_t updated : progress.take_updated()) {
      if (updated >= order.num_pinned) {
        chunks_[static_cast<size_t>(updated)].store->start_write(chunks_[static_cast<size_t>(updated)].ranges);
      }
    }
    if (move.action == PageAction::kFetch) {
      const Clock clock;
      chunk.store->fetch(chunk.ranges);
      fetch_seconds += clock.seconds();
      ++fetches;
      chunk.resident = true;
      progress.set_fetched(move.chunk);
    } else {
      chunk.store->release(chunk.ranges);
      chunk.resident = false;
    }
  };
  const auto update_chunk = [&](int64_t number) {
    const std::vector<StatePart>& own = parts[static_cast<size_t>(number)];
    const Clock clock;
    update(own.data(), static_cast<int64_t>(own.size()), alone_ ? kNoMoreThreads : kPagedUpdateGrain);
    update_seconds += clock.seconds();
    ++updates;
    progress.set_updated(number);
  };
  double transfer_seconds = 0.0;
  SideThread mover([&] {
    try {
      for (const PageMove& move : order.moves) {
        if (move.action == PageAction::kUpdate) {
          continue;
        }
        if (move.action == PageAction::kRelease && !parts[static_cast<size_t>(move.chunk)].empty()) {
          progress.wait_updated(move.chunk);
        }
        progress.rethrow();
        const Clock clock;
        transfer(move);
        transfer_seconds += clock.seconds();
      }
    } catch (...) {
      progress.fail();
    }
  });
  if (!mover.runs()) {  // there was no room for a thread: one after the other, then
    for (const PageMove& move : order.moves) {
      move.action == PageAction::kUpdate ? update_chunk(move.chunk) : transfer(move);
    }
    return;
  }
  const auto stalled = [this](double seconds) {
    stalls_ += seconds > 0.0 ? 1 : 0;
    stall_seconds_ = stall_seconds_ + seconds;
  };
  try {
    for (const PageMove& move : order.moves) {
      if (move.action == PageAction::kUpdate) {
        if (is_fetched[static_cast<size_t>(move.chunk)]) {
          stalled(progress.wait_fetched(move.chunk));
        }
        progress.rethrow();
        update_chunk(move.chunk);
      }
    }
  } catch (...) {
    progress.fail();
  }
  const Clock clock;
  mover.join();
  stalled(clock.seconds());
  progress.rethrow();
  if (fetches == 0 || updates == 0) {
    return;
  }
  const double ratio = fetch_seconds / static_cast<double>(fetches) * static_cast<double>(updates) / update_seconds;
  look_ahead_ = static_cast<int64_t>(std::ceil(std::clamp(ratio, 1.0, static_cast<double>(kMostAhead))));
  alone_ = alone_ && update_seconds < transfer_seconds;
}

void Pager::to_file() {
  for (Chunk& chunk : chunks_) {
    chunk.resident = false;
  }
  for (const auto& store : stores_) {
    store->to_file();
  }
}

bool Pager::to_memory() {
  bool all = true;
  for (const auto& store : stores_) {
    all = store->to_memory() && all;
  }
  return all;
}

void Pager::evict() {
  for (Chunk& chunk : chunks_) {
    chunk.resident = false;
  }
  for (const auto& store : stores_) {
    store->evict();
  }
}

}  // namespace qlora_native::cpu
