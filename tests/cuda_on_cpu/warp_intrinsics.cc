#include "cuda_on_cpu/warp_intrinsics.h"

#include <algorithm>

#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/visibility.h"

void cuemu_require_sm_80(const char* verb, cuemu::Site site) {
  if (cuemu::device().sm < 80) {
    cuemu::fail(site, "%s: sm_%d has none", verb, cuemu::device().sm);
  }
}

namespace cuemu {
namespace {

int source_lane(const ShufflePayload& payload, int lane) {
  const int begin = lane & ~(payload.width - 1);
  const int end = begin + payload.width;
  switch (payload.kind) {
    case Shuffle::kIndex:
      return begin + (payload.source & (payload.width - 1));
    case Shuffle::kUp:
      return lane - payload.source < begin ? lane : lane - payload.source;
    case Shuffle::kDown:
      return lane + payload.source >= end ? lane : lane + payload.source;
    case Shuffle::kXor: {
      const int source = lane ^ payload.source;
      return source >= end ? lane : source;
    }
  }
  return lane;
}

uint32_t combined(Combine how, uint32_t a, uint32_t b) {
  switch (how) {
    case Combine::kAll:
    case Combine::kAnd:
      return a & b;
    case Combine::kBallot:
    case Combine::kAny:
    case Combine::kOr:
      return a | b;
    case Combine::kXor:
      return a ^ b;
    case Combine::kSum:
      return a + b;
    case Combine::kMin:
      return static_cast<uint32_t>(std::min(static_cast<int32_t>(a), static_cast<int32_t>(b)));
    case Combine::kMax:
      return static_cast<uint32_t>(std::max(static_cast<int32_t>(a), static_cast<int32_t>(b)));
    case Combine::kMinUnsigned:
      return std::min(a, b);
    case Combine::kMaxUnsigned:
      return std::max(a, b);
  }
  return 0;
}

}  // namespace

void shuffle_all(Warp& warp, uint32_t mask) {
  ++counters().warp_meetings;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    Thread& thread = lane_of(warp, lane);
    auto& payload = *static_cast<ShufflePayload*>(thread.payload);
    const int source = source_lane(payload, lane);
    if (source < 0 || (mask >> source & 1) == 0) {
      fail(thread.site, "%s: lane %d reads from lane %d, which the mask %08x does not name or which does not exist",
           thread.verb, lane, source, mask);
    }
    payload.result = static_cast<ShufflePayload*>(lane_of(warp, source).payload)->bits;
  }
}

void combine_all(Warp& warp, uint32_t mask) {
  ++counters().warp_meetings;
  uint32_t result = 0;
  bool first = true;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const auto& payload = *static_cast<CombinePayload*>(lane_of(warp, lane).payload);
    const uint32_t value = payload.how == Combine::kBallot ? payload.value << lane : payload.value;
    result = first ? value : combined(payload.how, result, value);
    first = false;
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    static_cast<CombinePayload*>(lane_of(warp, __builtin_ctz(rest)).payload)->result = result;
  }
}

void sync_all(Warp& warp, uint32_t mask) {
  ++counters().warp_meetings;
  ++warp.epoch;
  share_with_warp(warp, mask);
}

}  // namespace cuemu
