#include "cuda_on_cpu/race.h"

#include <sys/mman.h>

#include <algorithm>
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

// Sixteen bytes that have been accessed alike so far share a cell; `split` ones have a cell a byte.
struct Slot {
  uint32_t epoch;  // the block's when the slot was last accessed: what is older is ordered
  bool split;
  Cell whole;
};

constexpr size_t kSlotBytes = 16;

// From pages that are only there once they are touched.
template <typename T>
T* zeroed(size_t count) {
  void* memory =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return static_cast<T*>(memory);
}

Slot& slot_of(size_t offset) {
  static Slot* const all = zeroed<Slot>(kArenaBytes / kSlotBytes);
  return all[offset / kSlotBytes];
}

Cell* cells_of(size_t offset) {
  static Cell* const all = zeroed<Cell>(kArenaBytes);
  return all + offset;
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

void access_cell(Cell& cell, Access access, Where where, const void* address) {
  const char* const mine = access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic";
  const bool both_atomic = access == Access::kAtomic && cell.write.atomic;
  const bool ordered = is_ordered(cell.write);
  if (!both_atomic && !ordered) {
    fail_race(mine, cell.write.atomic ? "atomic" : "write", where, cell.write.where, address);
  }
  if (access == Access::kRead) {
    add_read(cell, where);
    return;
  }
  for (const Reads& reads : cell.reads) {
    if (!is_ordered(reads)) {
      fail_race(mine, "read", where, reads.where, address);
    }
  }
  const uint16_t thread = both_atomic && !ordered ? kSeveral : static_cast<uint16_t>(self->linear);
  cell.write = Write{block.epoch, warp_of(*self).epoch, thread, access == Access::kAtomic, where};
}

// Bytes [begin, end) of the arena, all of one slot.
void access_slot(size_t begin, size_t end, Access access, Where where) {
  Slot& slot = slot_of(begin);
  if (slot.epoch != block.epoch) {
    slot = Slot{block.epoch, false, {}};
  }
  const bool all = end - begin == kSlotBytes;
  if (all && !slot.split) {
    access_cell(slot.whole, access, where, shared_arena + begin);
    return;
  }
  if (!slot.split) {
    std::fill_n(cells_of(begin / kSlotBytes * kSlotBytes), kSlotBytes, slot.whole);
    slot.split = true;
  }
  for (size_t i = begin; i < end; ++i) {
    access_cell(*cells_of(i), access, where, shared_arena + i);
  }
  if (all && access == Access::kWrite) {  // ordered after all that came before: what is ordered after it is, too
    slot.split = false;
    slot.whole = Cell{cells_of(begin)->write, {}};
  }
}

}  // namespace

void note_shared(const void* address, size_t num_bytes, Access access, Where where) {
  if (self == nullptr) {
    return;
  }
  check_within_shared(address, num_bytes, where);
  check_not_in_flight(address, num_bytes, where);
  const size_t end = arena_offset(address) + num_bytes;
  for (size_t begin = arena_offset(address); begin < end;) {
    const size_t next = std::min(end, (begin / kSlotBytes + 1) * kSlotBytes);
    access_slot(begin, next, access, where);
    begin = next;
  }
}

}  // namespace cuemu
