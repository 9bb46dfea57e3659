#include "cpu/files/weight_stream.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "cpu/files/side_thread.h"

namespace qlora_native::cpu {

namespace {

constexpr int64_t kPiece = 16 << 20;  // bytes between two looks at what is wanted

}  // namespace

// The thread of one process and what it shares with those that wait for it.
class WeightStream::Reader {
 public:
  explicit Reader(const WeightStream& stream) : stream_(stream), thread_([this] { run(); }) {}
  ~Reader() {
    {
      const std::scoped_lock lock(mutex_);
      ends_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  bool is_of_this_process() const { return process_ == getpid(); }
  bool want(std::vector<int64_t> units, int64_t now, bool begins_pass);
  void settle();

  template <typename Value>
  Value locked(Value Reader::* member) const {
    const std::scoped_lock lock(mutex_);
    return this->*member;
  }

  int64_t bytes_read_ = 0;
  int64_t stalls_ = 0;
  double stall_seconds_ = 0;
  std::set<int64_t> held_;

 private:
  void run();
  bool is_wanted(int64_t unit) const { return std::find(wanted_.begin(), wanted_.end(), unit) != wanted_.end(); }
  void fetch(std::unique_lock<std::mutex>& lock, const MappedPart& part);

  const WeightStream& stream_;
  const pid_t process_ = getpid();
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // what is wanted, or that it ends
  std::condition_variable moved_;    // what is held, or no longer wanted
  std::vector<int64_t> wanted_;
  size_t resident_read_ = 0;  // parts
  bool begins_pass_ = false;
  bool failed_ = false;
  bool ends_ = false;
  SideThread thread_;
};

WeightStream::WeightStream(std::vector<Unit> units, Unit resident, Unit rows)
    : units_(std::move(units)), resident_(std::move(resident)), rows_(std::move(rows)) {
  read_around(false);
  reader_ = new Reader(*this);
}

// What a fork took of the parent's reader is left as it is: locked it may be, and its thread is not there to wait for.
WeightStream::~WeightStream() {
  Reader* const last = reader_;
  if (last->is_of_this_process()) {
    delete last;
  }
  read_around(true);
}

WeightStream::Reader& WeightStream::reader() const {
  Reader* found = reader_;
  if (found->is_of_this_process()) {
    return *found;
  }
  auto own = std::make_unique<Reader>(*this);
  return reader_.compare_exchange_strong(found, own.get()) ? *own.release() : *found;  // of two threads one is first
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
  return reader().want(std::move(units), now, begins_pass);
}

void WeightStream::settle() { reader().settle(); }
int64_t WeightStream::bytes_read() const { return reader().locked(&Reader::bytes_read_); }
int64_t WeightStream::stalls() const { return reader().locked(&Reader::stalls_); }
double WeightStream::stall_seconds() const { return reader().locked(&Reader::stall_seconds_); }
std::set<int64_t> WeightStream::held() const { return reader().locked(&Reader::held_); }

bool WeightStream::Reader::want(std::vector<int64_t> units, int64_t now, bool begins_pass) {
  using Clock = std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  wanted_ = std::move(units);
  begins_pass_ = begins_pass_ || begins_pass;
  changed_.notify_all();
  moved_.notify_all();  // of another thread's unit, it may be the last word
  const auto need_not_wait = [&] { return now < 0 || failed_ || held_.count(now) > 0 || !is_wanted(now); };
  if (thread_.runs() && !need_not_wait()) {
    ++stalls_;
    const auto began = Clock::now();
    moved_.wait(lock, need_not_wait);
    stall_seconds_ += std::chrono::duration<double>(Clock::now() - began).count();
  }
  return !failed_;
}

void WeightStream::Reader::settle() {
  std::unique_lock lock(mutex_);
  if (thread_.runs()) {
    moved_.wait(lock, [&] {
      const std::set<int64_t> wanted(wanted_.begin(), wanted_.end());
      return failed_ || (held_ == wanted && resident_read_ == stream_.resident_.size());
    });
  }
}

// Without the lock while it reads; it stops where the stream ends.
void WeightStream::Reader::fetch(std::unique_lock<std::mutex>& lock, const MappedPart& part) {
  for (int64_t at = part.range.begin; at < part.range.end && !ends_ && !failed_; at += kPiece) {
    lock.unlock();
    const bool is_read = part.file->fetch({at, std::min(at + kPiece, part.range.end)});
    lock.lock();
    failed_ = failed_ || !is_read;
  }
}

void WeightStream::Reader::run() {
  std::unique_lock lock(mutex_);
  while (!ends_ && !failed_) {
    const auto behind = std::find_if_not(held_.begin(), held_.end(), [this](int64_t unit) { return is_wanted(unit); });
    const auto next =
        std::find_if(wanted_.begin(), wanted_.end(), [&](int64_t unit) { return held_.count(unit) == 0; });
    if (std::exchange(begins_pass_, false)) {
      lock.unlock();
      for (const MappedPart& part : stream_.rows_) {
        part.file->release(part.range);
      }
      lock.lock();
    } else if (behind != held_.end()) {
      const int64_t unit = *behind;
      held_.erase(behind);
      lock.unlock();
      for (const MappedPart& part : stream_.units_[static_cast<size_t>(unit)]) {
        part.file->release(part.range);
      }
      lock.lock();
    } else if (next != wanted_.end()) {
      const int64_t unit = *next;
      for (const MappedPart& part : stream_.units_[static_cast<size_t>(unit)]) {
        fetch(lock, part);
        bytes_read_ += part.range.size();
      }
      held_.insert(unit);
    } else if (resident_read_ < stream_.resident_.size()) {
      fetch(lock, stream_.resident_[resident_read_]);
      ++resident_read_;
    } else {
      changed_.wait(lock);
    }
    moved_.notify_all();
  }
}

}  // namespace qlora_native::cpu
