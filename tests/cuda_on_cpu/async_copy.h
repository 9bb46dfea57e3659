// cp.async as late as it may be: the copy's bytes are poison and belong to nobody from its issue to the wait that
// covers it, and only then take their values.
#pragma once

#include <cstddef>

#include "cuda_on_cpu/site.h"

namespace cuemu {

void issue_copy(void* shared, const void* global, int num_bytes, Site site);
void commit_copies();
void wait_for_copies(int pending_groups, Site site);

// Error if one of the bytes is in flight.
void check_not_in_flight(const void* address, size_t num_bytes, Where where);

// The running thread ends although copies of its own are in flight.
[[noreturn]] void fail_unwaited_copy();

// Before a launch: nothing is in flight.
void forget_copies();

}  // namespace cuemu
