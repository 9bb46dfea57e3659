#include "cuda_on_cpu/rendezvous.h"

#include <cstring>

#include "cuda_on_cpu/banks.h"
#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/scheduler.h"
#include "cuda_on_cpu/visibility.h"

namespace cuemu {
namespace {

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

void wait_in(Thread::State state, const char* verb, Site site, uint32_t mask, void* payload) {
  self->state = state;
  self->verb = verb;
  self->site = site;
  self->mask = mask;
  self->payload = payload;
}

// The lanes that wait for this one in the same operation at the same site with the same mask. Who waits for it
// elsewhere is an error; who waits for others first is not.
uint32_t lanes_met(const Warp& warp, const char* verb, Site site, uint32_t mask) {
  uint32_t met = 0;
  for (uint32_t rest = mask & warp.waiting; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Thread& other = lane_of(warp, lane);
    if ((other.mask >> self->lane & 1) == 0) {
      continue;
    }
    if (!same(verb, other.verb) || other.mask != mask || !same(site, other.site)) {
      fail(site,
           "divergent warp: lane %d is in %s with the mask %08x, but lane %d waits in %s with the mask %08x at %s",
           self->lane, verb, mask, lane, other.verb, other.mask, words(other.site).c_str());
    }
    met |= 1u << lane;
  }
  return met;
}

void open_barrier() {
  BarrierState& barrier = block.barrier;
  barrier.result_count = barrier.count;
  barrier.result_all = barrier.all;
  barrier.result_any = barrier.any;
  barrier.arrived = 0;
  ++block.epoch;
  ++counters().barriers;
  share_with_block();
  count_banks();
  for (int i = 0; i < block.num_warps; ++i) {
    Warp& warp = block.warps[static_cast<size_t>(i)];
    warp.ready = warp.existing;
  }
  for (int i = 0; i < block.num_threads; ++i) {
    block.threads[static_cast<size_t>(i)]->state = Thread::State::kReady;
  }
  redraw_order();
}

}  // namespace

int meet_block(const char* verb, Site site, Vote vote, int value) {
  BarrierState& barrier = block.barrier;
  if (block.num_ended != 0) {
    fail(site, "divergent barrier: thread %d is in %s, but %d of the block's %d threads have ended", self->linear, verb,
         block.num_ended, block.num_threads);
  }
  if (barrier.arrived == 0) {
    barrier.verb = verb;  // the last results stay: a thread that has not run since may still fetch them
    barrier.site = site;
    barrier.count = 0;
    barrier.all = 1;
    barrier.any = 0;
  } else if (!same(verb, barrier.verb) || !same(site, barrier.site)) {
    fail(site, "divergent barrier: thread %d is in %s, but others wait in %s at %s", self->linear, verb, barrier.verb,
         words(barrier.site).c_str());
  }
  ++barrier.arrived;
  barrier.count += value != 0;
  barrier.all &= value != 0;
  barrier.any |= value != 0;
  if (barrier.arrived == block.num_threads) {
    open_barrier();
  } else {
    wait_in(Thread::State::kAtBarrier, verb, site, 0, nullptr);
    warp_of(*self).ready &= ~(1u << self->lane);
    Fiber::yield();
  }
  switch (vote) {
    case Vote::kNone:
      return 0;
    case Vote::kCount:
      return block.barrier.result_count;
    case Vote::kAll:
      return block.barrier.result_all;
    case Vote::kAny:
      return block.barrier.result_any;
  }
  return 0;
}

void meet_warp(const char* verb, Site site, uint32_t mask, bool whole, void* payload, Perform perform) {
  Warp& warp = warp_of(*self);
  const uint32_t mine = 1u << self->lane;
  if ((mask & mine) == 0) {
    fail(site, "%s by lane %d with the mask %08x, which does not name that lane", verb, self->lane, mask);
  }
  if ((mask & warp.ended) != 0) {
    fail(site, "%s with the mask %08x, but its lanes %08x have ended", verb, mask, mask & warp.ended);
  }
  if (whole && warp.existing != kAllLanes) {
    fail(site, "%s needs 32 lanes, but the block ends within this warp", verb);
  }
  const uint32_t named = mask & warp.existing;
  Meeting& last = warp.last;
  if (last.arrived == 0 || last.mask != mask || !same(last.verb, verb) || !same(last.site, site)) {
    last = Meeting{verb, site, mask, lanes_met(warp, verb, site, mask)};
  }
  last.arrived |= mine;
  wait_in(Thread::State::kInWarp, verb, site, mask, payload);
  warp.waiting |= mine;
  if (last.arrived != named) {
    warp.ready &= ~mine;
    Fiber::yield();
    return;
  }
  last.arrived = 0;
  perform(warp, named);
  warp.waiting &= ~named;
  warp.ready |= named;
  for (uint32_t rest = named; rest != 0; rest &= rest - 1) {
    lane_of(warp, __builtin_ctz(rest)).state = Thread::State::kReady;
  }
}

}  // namespace cuemu
