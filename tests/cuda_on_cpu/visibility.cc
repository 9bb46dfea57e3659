#include "cuda_on_cpu/visibility.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <vector>

#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/report.h"

namespace cuemu {
namespace {

// A store of this block that others may not see yet. A byte's writer: 0, or (block + 1) << 1 | published.
struct Unpublished {
  uint32_t* writers;  // [num_bytes]
  size_t num_bytes;
  bool is_fenced;
  int thread;  // that stored, or fenced, and when
  uint32_t epoch, warp_epoch;
};

uint32_t launch = 0;
bool is_watched = false;  // the launch has several blocks
uint32_t mine = 0;        // this block's word, not published
std::vector<Unpublished> unpublished;

bool is_ordered_before_me(const Unpublished& write) {
  return write.thread == self->linear || write.epoch != block.epoch ||
         (write.thread / kLanes == self->warp && write.warp_epoch != warp_of(*self).epoch);
}

// A launch's first write to the range forgets what the launch before wrote.
void open_writers(Range& range) {
  const size_t bytes = range.num_bytes * sizeof(uint32_t);
  if (range.writers == nullptr) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    range.writers = static_cast<uint32_t*>(memory);
  } else if (range.written_in != launch) {
    madvise(range.writers, bytes, MADV_DONTNEED);
  }
  range.written_in = launch;
}

void check_writer(uint32_t writer, const char* verb, Access access, Where where) {
  if (writer == 0 || writer >> 1 == mine >> 1) {
    return;
  }
  const unsigned other = (writer >> 1) - 1;
  if ((writer & 1) == 0) {
    fail(where, "%s of bytes that block %u wrote in this launch and did not publish with a __threadfence()", verb,
         other);
  }
  if (!self->has_acquired && access != Access::kAtomic) {
    fail(where, "%s of bytes that block %u wrote in this launch, with no atomic and __threadfence() before it", verb,
         other);
  }
}

void publish_fenced() {
  std::erase_if(unpublished, [](const Unpublished& write) {
    if (!write.is_fenced || !is_ordered_before_me(write)) {
      return false;
    }
    for (size_t i = 0; i < write.num_bytes; ++i) {
      write.writers[i] |= write.writers[i] == mine ? 1 : 0;
    }
    return true;
  });
}

}  // namespace

void begin_visibility(uint64_t num_blocks) {
  ++launch;
  is_watched = num_blocks > 1 && num_blocks < 1u << 30;
}

void begin_block_visibility(uint32_t number) {
  mine = (number + 1) << 1;
  unpublished.clear();
}

void note_visible(Range& range, size_t offset, size_t num_bytes, Access access, const char* verb, Where where) {
  if (!is_watched) {
    return;
  }
  if (access == Access::kAtomic) {
    self->did_atomic = true;
    publish_fenced();
  }
  if (range.written_in == launch) {
    for (size_t i = offset; i < offset + num_bytes; ++i) {
      check_writer(range.writers[i], verb, access, where);
    }
  }
  if (access == Access::kWrite) {
    if (range.written_in != launch) {
      open_writers(range);
    }
    std::fill_n(range.writers + offset, num_bytes, mine);
    unpublished.push_back({range.writers + offset, num_bytes, false, self->linear, block.epoch, warp_of(*self).epoch});
  }
}

void forget_writers(Range& range) {
  if (range.writers != nullptr) {
    munmap(range.writers, range.num_bytes * sizeof(uint32_t));
    range.writers = nullptr;
    unpublished.clear();
  }
}

void fence() {
  if (self == nullptr || !is_watched) {
    return;
  }
  self->has_acquired |= self->did_atomic;
  for (Unpublished& write : unpublished) {
    if (!write.is_fenced && is_ordered_before_me(write)) {
      write = {write.writers, write.num_bytes, true, self->linear, block.epoch, warp_of(*self).epoch};
    }
  }
}

void share_with_block() {
  const auto end = block.threads.begin() + block.num_threads;
  if (is_watched &&
      std::any_of(block.threads.begin(), end, [](const Thread* thread) { return thread->has_acquired; })) {
    std::for_each(block.threads.begin(), end, [](Thread* thread) { thread->has_acquired = true; });
  }
}

void share_with_warp(Warp& warp, uint32_t mask) {
  bool any = false;
  for (uint32_t rest = is_watched ? mask : 0; rest != 0; rest &= rest - 1) {
    any |= lane_of(warp, __builtin_ctz(rest)).has_acquired;
  }
  for (uint32_t rest = any ? mask : 0; rest != 0; rest &= rest - 1) {
    lane_of(warp, __builtin_ctz(rest)).has_acquired = true;
  }
}

}  // namespace cuemu
