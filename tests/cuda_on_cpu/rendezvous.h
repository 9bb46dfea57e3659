// Where threads wait for each other: barriers of the block, and operations that a warp carries out together.
#pragma once

#include <cstdint>

#include "cuda_on_cpu/block.h"

namespace cuemu {

enum class Vote : uint8_t { kNone, kCount, kAll, kAny };

// Waits until every thread of the block is here. Ended threads and other sites are errors. Gives the vote on `value`.
int meet_block(const char* verb, Site site, Vote vote = Vote::kNone, int value = 0);

// What the last lane to come does for all lanes of `mask`; each Thread's payload is what that lane brought.
using Perform = void (*)(Warp& warp, uint32_t mask);

// Waits until every lane that `mask` names is here with the same operation, site and mask. Lanes that never existed
// (the end of a block) do not count, unless `whole`: then all 32 must be there, as for operations that PTX calls
// .aligned.
void meet_warp(const char* verb, Site site, uint32_t mask, bool whole, void* payload, Perform perform);

}  // namespace cuemu
