#include "cpu/weight_stream.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace qlora_native::cpu {

namespace {

constexpr int64_t kPiece = 16 << 20;  // bytes between two looks at what is wanted

}  // namespace

WeightStream::WeightStream(std::vector<Unit> units, Unit resident, Unit rows)
    : units_(std::move(units)), resident_(std::move(resident)), rows_(std::move(rows)) {
  read_around(false);
  thread_ = std::make_unique<SideThread>([this] { run(); });
}

WeightStream::~WeightStream() {
  {
    const std::scoped_lock lock(mutex_);
    ends_ = true;
  }
  changed_.notify_all();
  thread_->join();
  read_around(true);
}

// The thread reads the units whole, of the rows few are used.
void WeightStream::read_around(bool allowed) const {
  for (const Unit& unit : units_) {
    for (const MappedPart& part : unit) {
      part.file->read_around(part.range, allowed);
    }
  }
  for (const MappedPart& part : rows_) {
    part.file->read_around(part.range, allowed);
  }
}

bool WeightStream::want(std::vector<int64_t> units, int64_t now, bool begins_pass) {
  using Clock = std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  wanted_ = std::move(units);
  begins_pass_ = begins_pass_ || begins_pass;
  changed_.notify_all();
  const auto is_there = [&] { return now < 0 || failed_ || held_.count(now) > 0; };
  if (thread_->runs() && !is_there()) {
    ++stalls_;
    const auto began = Clock::now();
    moved_.wait(lock, is_there);
    stall_seconds_ += std::chrono::duration<double>(Clock::now() - began).count();
  }
  return !failed_;
}

void WeightStream::settle() {
  std::unique_lock lock(mutex_);
  if (thread_->runs()) {
    moved_.wait(lock, [&] {
      const std::set<int64_t> wanted(wanted_.begin(), wanted_.end());
      return failed_ || (held_ == wanted && resident_read_ == resident_.size());
    });
  }
}

int64_t WeightStream::bytes_read() const {
  const std::scoped_lock lock(mutex_);
  return bytes_read_;
}

int64_t WeightStream::stalls() const {
  const std::scoped_lock lock(mutex_);
  return stalls_;
}

double WeightStream::stall_seconds() const {
  const std::scoped_lock lock(mutex_);
  return stall_seconds_;
}

std::set<int64_t> WeightStream::held() const {
  const std::scoped_lock lock(mutex_);
  return held_;
}

// Without the lock while it reads; it stops where the stream ends.
void WeightStream::fetch(std::unique_lock<std::mutex>& lock, const MappedPart& part) {
  for (int64_t at = part.range.begin; at < part.range.end && !ends_ && !failed_; at += kPiece) {
    lock.unlock();
    const bool is_read = part.file->fetch({at, std::min(at + kPiece, part.range.end)});
    lock.lock();
    failed_ = failed_ || !is_read;
  }
}

void WeightStream::run() {
  std::unique_lock lock(mutex_);
  while (!ends_ && !failed_) {
    const auto is_wanted = [&](int64_t unit) {
      return std::find(wanted_.begin(), wanted_.end(), unit) != wanted_.end();
    };
    const auto behind = std::find_if_not(held_.begin(), held_.end(), is_wanted);
    const auto next =
        std::find_if(wanted_.begin(), wanted_.end(), [&](int64_t unit) { return held_.count(unit) == 0; });
    if (std::exchange(begins_pass_, false)) {
      lock.unlock();
      for (const MappedPart& part : rows_) {
        part.file->release(part.range);
      }
      lock.lock();
    } else if (behind != held_.end()) {
      const int64_t unit = *behind;
      held_.erase(behind);
      lock.unlock();
      for (const MappedPart& part : units_[static_cast<size_t>(unit)]) {
        part.file->release(part.range);
      }
      lock.lock();
    } else if (next != wanted_.end()) {
      const int64_t unit = *next;
      for (const MappedPart& part : units_[static_cast<size_t>(unit)]) {
        fetch(lock, part);
        bytes_read_ += part.range.size();
      }
      held_.insert(unit);
    } else if (resident_read_ < resident_.size()) {
      fetch(lock, resident_[resident_read_]);
      ++resident_read_;
    } else {
      changed_.wait(lock);
    }
    moved_.notify_all();
  }
}

}  // namespace qlora_native::cpu
