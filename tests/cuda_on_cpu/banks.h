// Bank conflicts of loads and stores of shared memory: how many passes over the 32 banks of 4 bytes each access of a
// warp takes. A pass serves one word of each bank, to any number of lanes. Accesses of 8 bytes go by half warps, of 16
// by quarters. The lanes' n-th executions of an instruction between two barriers are taken for one access of the warp.
//
// Plain accesses are counted in the `race` build alone. Members of one aligned vector of 8 or 16 bytes that the host's
// compiler accesses one by one are taken for one access; nvcc may join more.
// ldmatrix and cp.async are not among them; counters.h has the former.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_on_cpu/site.h"

namespace cuemu {

struct BankCount {
  std::string where;
  uint64_t accesses;  // of a warp
  uint64_t passes;
  uint64_t least;  // passes without conflicts
};

inline bool watches_banks = false;  // not at the start, because it costs time

// Of each instruction since the last call; the one with the most passes above the least comes first.
std::vector<BankCount> take_bank_counts();

void note_bank_now(const void* address, size_t num_bytes, Where where);
inline void note_bank(const void* address, size_t num_bytes, Where where) {
  if (watches_banks) {
    note_bank_now(address, num_bytes, where);
  }
}

void count_banks();  // what was noted: at a barrier and at a block's end

}  // namespace cuemu
