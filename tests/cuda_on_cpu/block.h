// The block that is running: its threads, who waits for whom, and the counts by which accesses are ordered.
//
// Blocks run one after the other on one thread of the machine, so all of this is one object.
#pragma once

#include <driver_types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "cuda_on_cpu/fiber.h"
#include "cuda_on_cpu/site.h"

namespace cuemu {

inline constexpr int kLanes = 32;
inline constexpr int kMostThreads = 1024;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

struct AsyncCopy {
  std::byte* shared;   // [16]
  const void* global;  // [num_bytes], null if num_bytes is 0
  std::array<std::byte, 16> value;
  int num_bytes;
  uint32_t group;
  Site site;
};

struct Thread {
  enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kEnded };

  Fiber fiber;
  uint3 index;
  int linear;
  int lane;
  int warp;
  State state;
  const char* verb;  // what it waits in, unless kReady or kEnded
  Site site;
  uint32_t mask;
  void* payload;
  std::vector<AsyncCopy> copies;  // in flight, oldest first
  uint32_t group;                 // groups committed so far
  bool did_atomic, has_acquired;  // visibility.h
};

// An operation of the warp that lanes have come to and that has not been carried out.
struct Meeting {
  const char* verb;
  Site site;
  uint32_t mask;
  uint32_t arrived;
};

struct Warp {
  uint32_t existing;
  uint32_t ended;
  uint32_t ready;
  uint32_t waiting;  // in an operation of the warp
  uint32_t epoch;    // how often __syncwarp has ordered this warp's accesses; never repeats within a launch
  Meeting last;      // the one that a lane came to last: most meetings are alone
  int first_lane;    // for schedules that do not begin with lane 0
};

struct BarrierState {
  const char* verb;
  Site site;
  int arrived;
  int count, all, any;
  int result_count, result_all, result_any;
};

struct Block {
  std::deque<Thread> pool;  // grows, never shrinks; a Thread's address stays
  std::array<Thread*, kMostThreads> threads;
  std::array<Warp, kMostThreads / kLanes> warps;
  int num_threads;
  int num_warps;
  int num_ended;
  BarrierState barrier;
  uint32_t epoch;  // how often __syncthreads has ordered accesses; never repeats within a launch
  bool failed;
  cudaError_t failure;  // what the launch gives then
};

inline Block block{};
inline Thread* self = nullptr;  // null on the host

// The running thread is in a check, and not in the kernel: what hooks are called for is the emulator's own. (Functions
// of the standard library that the kernel's file holds too are linked once, with hooks.)
inline bool in_check = false;

inline Warp& warp_of(const Thread& thread) { return block.warps[static_cast<size_t>(thread.warp)]; }
inline Thread& lane_of(const Warp& warp, int lane) {
  return *block.threads[static_cast<size_t>((&warp - block.warps.data()) * kLanes + lane)];
}

}  // namespace cuemu
