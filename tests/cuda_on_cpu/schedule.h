// The order in which threads get to run. Every order is one that a GPU may take; a seed repeats it exactly.
//
// A warp runs until all its lanes wait, then the next one. Warps kept in step by a fair schedule would hide missing
// barriers; these run as far ahead of each other as the kernel lets them.
#pragma once

#include <cstdint>
#include <vector>

namespace cuemu {

struct Schedule {
  enum class Kind : uint8_t {
    kForward,   // lowest warp, lane and block first
    kReverse,   // highest first
    kPriority,  // warps ranked at random, drawn anew at each block and barrier; blocks and first lanes at random
  };
  Kind kind = Kind::kForward;
  uint64_t seed = 0;
};

void set_schedule(Schedule schedule);
const char* name_of(const Schedule& schedule);

// Forward, reverse and three seeds.
const std::vector<Schedule>& all_schedules();

}  // namespace cuemu
