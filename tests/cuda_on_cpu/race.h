// The race check on shared memory. Two accesses of a byte by different threads, one of them a write, must be ordered by
// a __syncthreads between them, or within a warp by a __syncwarp. Shuffles, votes and matrix operations order nothing,
// as the CUDA programming guide has it; atomics do not race with atomics.
//
// A __syncwarp of some lanes counts as one of all lanes, so races that need the difference are missed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/shared_memory.h"
#include "cuda_on_cpu/site.h"

namespace cuemu {

// Of the running thread. An address outside any array of shared memory is an error.
void note_shared(const void* address, size_t num_bytes, Access access, Where where);

}  // namespace cuemu
