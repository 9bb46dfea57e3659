#include "cuda_on_cpu/race.h"

#include <sys/mman.h>

#include <new>

#include "cuda_on_cpu/async_copy.h"
#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/report.h"

namespace cuemu {
namespace {

constexpr uint16_t kSeveral = 0xffff;  // more than one thread, by atomics

struct Write {
  uint32_t epoch;  // of the block; 0: never written
  uint32_t warp_epoch;
  uint16_t thread;
  bool atomic;
  Where where;
};

// The reads of one warp since its last __syncwarp.
struct Reads {
  uint32_t epoch;
  uint32_t warp_epoch;
  uint32_t lanes;
  uint16_t warp;
  Where where;
};

// Two warps' reads are enough: whoever writes, one of the two is another warp's.
struct Cell {
  Write write;
  Reads reads[2];
};

// A cell a byte, from pages that are only there once they are touched.
Cell* cells() {
  static Cell* const all = [] {
    void* memory = mmap(nullptr, kArenaBytes * sizeof(Cell), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    return static_cast<Cell*>(memory);
  }();
  return all;
}

bool is_ordered(const Write& write) {
  const Thread& thread = *self;
  if (write.epoch != block.epoch || write.thread == thread.linear) {
    return true;
  }
  return write.thread != kSeveral && write.thread / kLanes == thread.warp && write.warp_epoch != warp_of(thread).epoch;
}

bool is_ordered(const Reads& reads) {
  const Thread& thread = *self;
  if (reads.epoch != block.epoch) {
    return true;
  }
  if (reads.warp != thread.warp) {
    return false;
  }
  return reads.warp_epoch != warp_of(thread).epoch || (reads.lanes & ~(1u << thread.lane)) == 0;
}

void add_read(Cell& cell, Where where) {
  const Thread& thread = *self;
  const uint32_t warp_epoch = warp_of(thread).epoch;
  const auto is_mine = [&thread](const Reads& reads) {
    return reads.epoch == block.epoch && reads.warp == thread.warp;
  };
  Reads* slot = nullptr;
  if (is_mine(cell.reads[0]) || cell.reads[0].epoch != block.epoch) {
    slot = &cell.reads[0];
  } else if (is_mine(cell.reads[1]) || cell.reads[1].epoch != block.epoch) {
    slot = &cell.reads[1];
  } else {
    return;
  }
  if (!is_mine(*slot) || slot->warp_epoch != warp_epoch) {
    *slot = Reads{block.epoch, warp_epoch, 0, static_cast<uint16_t>(thread.warp), where};
  }
  slot->lanes |= 1u << thread.lane;
  slot->where = where;
}

[[noreturn]] void fail_race(const char* mine, const char* theirs, Where where, Where before, const void* address) {
  fail(where, "race: this %s of shared memory at %p and the %s at %s are not ordered by a barrier", mine, address,
       theirs, words(before).c_str());
}

}  // namespace

void note_shared(const void* address, size_t num_bytes, Access access, Where where) {
  if (self == nullptr) {
    return;
  }
  check_within_shared(address, num_bytes, where);
  check_not_in_flight(address, num_bytes, where);
  const char* const mine = access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic";
  Cell* cell = cells() + arena_offset(address);
  for (size_t i = 0; i < num_bytes; ++i, ++cell) {
    const bool both_atomic = access == Access::kAtomic && cell->write.atomic;
    if (!both_atomic && !is_ordered(cell->write)) {
      fail_race(mine, cell->write.atomic ? "atomic" : "write", where, cell->write.where,
                static_cast<const std::byte*>(address) + i);
    }
    if (access == Access::kRead) {
      add_read(*cell, where);
      continue;
    }
    for (const Reads& reads : cell->reads) {
      if (!is_ordered(reads)) {
        fail_race(mine, "read", where, reads.where, static_cast<const std::byte*>(address) + i);
      }
    }
    const bool joins = both_atomic && !is_ordered(cell->write);
    cell->write = Write{block.epoch, warp_of(*self).epoch, joins ? kSeveral : static_cast<uint16_t>(self->linear),
                        access == Access::kAtomic, where};
  }
}

}  // namespace cuemu
