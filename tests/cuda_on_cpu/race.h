// The race check on shared memory. Two accesses of a byte by different threads, one of them a write, must be ordered by
// a __syncthreads between them, or within a warp by a __syncwarp. Shuffles, votes and matrix operations order nothing,
// as the CUDA programming guide has it; atomics do not race with atomics.
//
// A __syncwarp of some lanes counts as one of all lanes, so races that need the difference are missed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/shared_memory.h"
#include "cuda_on_cpu/site.h"

namespace cuemu {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Of the running thread. Addresses outside shared memory are let pass; those outside any array of it are errors.
void note_shared(const void* address, size_t num_bytes, Access access, Where where);

inline void note(const void* address, size_t num_bytes, Access access, Where where) {
  if (is_shared(address)) {
    note_shared(address, num_bytes, access, where);
  } else if (global_bytes().counts && is_global(address)) {
    (access == Access::kRead ? global_bytes().read : global_bytes().written) += num_bytes;
  }
}

}  // namespace cuemu
