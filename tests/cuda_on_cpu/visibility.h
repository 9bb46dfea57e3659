// What one block sees of another's writes. Blocks run one after the other here, so that memory alone would show each
// write at once; on a device it may stay unseen until the launch ends. A block that reads what another one wrote in the
// same launch is therefore reported, unless
//   - the writer published it: a __threadfence() after the write and an atomic operation after that, each by the same
//     thread or by one that a barrier ordered after the step before;
//   - the reader asked: an atomic operation and after it a __threadfence(), by the thread that reads or by one that a
//     barrier ordered before the read.
// A block that overwrites another's bytes needs the same. Kept for plain stores in the `race` build, and for those
// through wp:: and __stcg and its kin in all of them; atomics need no fence for their own bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_on_cpu/site.h"

namespace cuemu {

struct Range;
struct Warp;

void begin_visibility(uint64_t num_blocks);  // of a launch
void begin_block_visibility(uint32_t number);

// Of the running thread. Bytes [offset, offset + num_bytes) of the range.
void note_visible(Range& range, size_t offset, size_t num_bytes, Access access, const char* verb, Where where);
void forget_writers(Range& range);

void fence();             // __threadfence() of the running thread
void share_with_block();  // a barrier has opened
void share_with_warp(Warp& warp, uint32_t mask);

}  // namespace cuemu
