#include "cuda_on_cpu/scheduler.h"

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>

#include "cuda_on_cpu/async_copy.h"
#include "cuda_on_cpu/banks.h"
#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/builtins.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/schedule.h"
#include "cuda_on_cpu/shared_memory.h"
#include "cuda_on_cpu/visibility.h"

namespace cuemu {
namespace {

Schedule schedule;
std::mt19937_64 random_source;
std::array<int, kMostThreads / kLanes> warp_of_rank;
const std::function<void()>* body = nullptr;

int below(int count) { return static_cast<int>(random_source() % static_cast<uint64_t>(count)); }

void enter() {
  (*body)();
  if (!self->copies.empty()) {
    fail_unwaited_copy();
  }
  self->state = Thread::State::kEnded;
  ++block.num_ended;
  Warp& warp = warp_of(*self);
  warp.ended |= 1u << self->lane;
  warp.ready &= ~(1u << self->lane);
  if (block.barrier.arrived != 0) {
    fail(block.barrier.site, "divergent barrier: %d threads wait in %s, but thread %d has ended", block.barrier.arrived,
         block.barrier.verb, self->linear);
  }
}

void start_threads(dim3 shape) {
  block.num_threads = static_cast<int>(shape.x * shape.y * shape.z);
  block.num_warps = (block.num_threads + kLanes - 1) / kLanes;
  block.num_ended = 0;
  block.barrier = {};
  ++block.epoch;
  while (block.pool.size() < static_cast<size_t>(block.num_threads)) {
    Thread& thread = block.pool.emplace_back();
    thread.linear = static_cast<int>(block.pool.size()) - 1;
    thread.lane = thread.linear % kLanes;
    thread.warp = thread.linear / kLanes;
    block.threads[block.pool.size() - 1] = &thread;
  }
  uint3 index{0, 0, 0};
  for (int i = 0; i < block.num_threads; ++i) {
    Thread& thread = *block.threads[static_cast<size_t>(i)];
    thread.index = index;
    thread.state = Thread::State::kReady;
    thread.copies.clear();
    thread.group = 0;
    thread.did_atomic = thread.has_acquired = false;
    thread.fiber.start(enter);
    if (++index.x == shape.x) {
      index.x = 0;
      if (++index.y == shape.y) {
        index.y = 0;
        ++index.z;
      }
    }
  }
  for (int i = 0; i < block.num_warps; ++i) {
    Warp& warp = block.warps[static_cast<size_t>(i)];
    const int lanes = std::min(kLanes, block.num_threads - i * kLanes);
    warp.existing = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp.ready = warp.existing;
    warp.ended = 0;
    warp.waiting = 0;
    warp.last = {};
    ++warp.epoch;
  }
}

Thread* next_thread() {
  for (int rank = 0; rank < block.num_warps; ++rank) {
    Warp& warp = block.warps[static_cast<size_t>(warp_of_rank[static_cast<size_t>(rank)])];
    if (warp.ready == 0) {
      continue;
    }
    if (schedule.kind == Schedule::Kind::kReverse) {
      return &lane_of(warp, 31 - __builtin_clz(warp.ready));
    }
    const uint32_t later = warp.ready & kAllLanes << warp.first_lane;
    return &lane_of(warp, __builtin_ctz(later != 0 ? later : warp.ready));
  }
  return nullptr;
}

// "0-30, 32" of the threads for which `chosen` holds.
template <typename Chosen>
std::string ranges(Chosen chosen) {
  std::string text;
  for (int i = 0; i < block.num_threads; ++i) {
    if (!chosen(*block.threads[static_cast<size_t>(i)])) {
      continue;
    }
    int last = i;
    while (last + 1 < block.num_threads && chosen(*block.threads[static_cast<size_t>(last) + 1])) {
      ++last;
    }
    text += (text.empty() ? "" : ", ") + std::to_string(i) + (last > i ? "-" + std::to_string(last) : "");
    i = last;
  }
  return text;
}

void report_deadlock() {
  std::string text = "deadlock: no thread of block (" + std::to_string(::blockIdx.x) + ", " +
                     std::to_string(::blockIdx.y) + ", " + std::to_string(::blockIdx.z) + ") can go on:";
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& first = *block.threads[static_cast<size_t>(i)];
    const auto alike = [&first](const Thread& other) {
      return other.state == first.state &&
             (first.state == Thread::State::kEnded || (other.site.line == first.site.line && other.verb == first.verb));
    };
    bool is_first = true;
    for (int j = 0; j < i && is_first; ++j) {
      is_first = !alike(*block.threads[static_cast<size_t>(j)]);
    }
    if (is_first) {
      text +=
          "\n  threads " + ranges(alike) + " " +
          (first.state == Thread::State::kEnded ? "have ended"
                                                : std::string("wait in ") + first.verb + " at " + words(first.site));
    }
  }
  add_report(std::move(text));
}

bool run_block() {
  while (block.num_ended < block.num_threads) {
    Thread* thread = next_thread();
    if (thread == nullptr) {
      report_deadlock();
      return false;
    }
    self = thread;
    ::threadIdx = thread->index;
    thread->fiber.resume();
    self = nullptr;
    in_check = false;
    if (block.failed) {
      return false;
    }
  }
  return true;
}

// Blocks in the order start, start + step, ... modulo count.
struct BlockOrder {
  uint64_t start, step;  // step shares no factor with count, so every block comes once
};

BlockOrder draw_block_order(uint64_t count) {
  switch (schedule.kind) {
    case Schedule::Kind::kForward:
      return {0, 1};
    case Schedule::Kind::kReverse:
      return {count - 1, count - 1};
    case Schedule::Kind::kPriority: {
      uint64_t step = random_source() % count;
      while (std::gcd(step, count) != 1) {
        ++step;
      }
      return {random_source() % count, step};
    }
  }
  return {0, 1};
}

}  // namespace

void set_schedule(Schedule chosen) { schedule = chosen; }

const char* name_of(const Schedule& chosen) {
  static char text[40];
  switch (chosen.kind) {
    case Schedule::Kind::kForward:
      return "forward";
    case Schedule::Kind::kReverse:
      return "reverse";
    case Schedule::Kind::kPriority:
      std::snprintf(text, sizeof(text), "priority, seed %" PRIu64, chosen.seed);
      return text;
  }
  return "";
}

const std::vector<Schedule>& all_schedules() {
  static const std::vector<Schedule> all{{Schedule::Kind::kForward, 0},
                                         {Schedule::Kind::kReverse, 0},
                                         {Schedule::Kind::kPriority, 1},
                                         {Schedule::Kind::kPriority, 2},
                                         {Schedule::Kind::kPriority, 3}};
  return all;
}

void redraw_order() {
  const auto end = warp_of_rank.begin() + block.num_warps;
  std::iota(warp_of_rank.begin(), end, 0);
  if (schedule.kind == Schedule::Kind::kReverse) {
    std::reverse(warp_of_rank.begin(), end);
  } else if (schedule.kind == Schedule::Kind::kPriority) {
    for (int i = block.num_warps - 1; i > 0; --i) {
      std::swap(warp_of_rank[static_cast<size_t>(i)], warp_of_rank[static_cast<size_t>(below(i + 1))]);
    }
  }
  for (int i = 0; i < block.num_warps; ++i) {
    block.warps[static_cast<size_t>(i)].first_lane = schedule.kind == Schedule::Kind::kPriority ? below(kLanes) : 0;
  }
}

bool run_grid(const Grid& grid, const std::function<void()>& thread_body) {
  body = &thread_body;
  random_source.seed(schedule.seed);
  block.failed = false;
  block.failure = cudaErrorLaunchFailure;
  ::gridDim = grid.grid;
  ::blockDim = grid.block;
  begin_shared(grid.dynamic_bytes);
  const uint64_t count = uint64_t{grid.grid.x} * grid.grid.y * grid.grid.z;
  begin_visibility(count);
  const BlockOrder order = draw_block_order(count);
  uint64_t number = order.start;
  for (uint64_t i = 0; i < count; ++i, number = (number + order.step) % count) {
    ::blockIdx = {static_cast<unsigned>(number % grid.grid.x),
                  static_cast<unsigned>(number / grid.grid.x % grid.grid.y),
                  static_cast<unsigned>(number / grid.grid.x / grid.grid.y)};
    refill_shared();
    begin_block_visibility(static_cast<uint32_t>(number));
    start_threads(grid.block);
    redraw_order();
    bool ran = run_block();
    count_banks();
    if (std::string overrun = overrun_region(); ran && !overrun.empty()) {
      add_report(std::move(overrun));
      ran = false;
    }
    if (!ran) {
      end_shared();
      return false;
    }
  }
  end_shared();
  return true;
}

}  // namespace cuemu
