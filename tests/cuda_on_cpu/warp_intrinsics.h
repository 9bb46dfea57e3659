// Barriers, shuffles, votes and reductions under CUDA's own names.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/rendezvous.h"
#include "cuda_on_cpu/report.h"

namespace cuemu {

enum class Shuffle : uint8_t { kIndex, kUp, kDown, kXor };

struct ShufflePayload {
  uint64_t bits;
  uint64_t result;
  int source;  // lane, or distance
  int width;
  Shuffle kind;
};

void shuffle_all(Warp& warp, uint32_t mask);

template <typename T>
T shuffle(const char* verb, Shuffle kind, uint32_t mask, T value, int source, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  if (width <= 0 || width > kLanes || (width & (width - 1)) != 0) {
    fail(site, "%s: width %d, expected a power of two up to 32", verb, width);
  }
  ShufflePayload payload{0, 0, source, width, kind};
  std::memcpy(&payload.bits, &value, sizeof(T));
  meet_warp(verb, site, mask, false, &payload, shuffle_all);
  std::memcpy(&value, &payload.result, sizeof(T));
  return value;
}

enum class Combine : uint8_t { kBallot, kAll, kAny, kSum, kMin, kMax, kMinUnsigned, kMaxUnsigned, kAnd, kOr, kXor };

struct CombinePayload {
  uint32_t value;
  uint32_t result;
  Combine how;
};

void combine_all(Warp& warp, uint32_t mask);

inline uint32_t combine(const char* verb, Combine how, uint32_t mask, uint32_t value, Site site) {
  CombinePayload payload{value, 0, how};
  meet_warp(verb, site, mask, false, &payload, combine_all);
  return payload.result;
}

void sync_all(Warp& warp, uint32_t mask);

}  // namespace cuemu

inline void __syncthreads(cuemu::Site site = cuemu::Site::here()) { cuemu::meet_block("__syncthreads", site); }
inline int __syncthreads_count(int predicate, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::meet_block("__syncthreads_count", site, cuemu::Vote::kCount, predicate);
}
inline int __syncthreads_and(int predicate, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::meet_block("__syncthreads_and", site, cuemu::Vote::kAll, predicate);
}
inline int __syncthreads_or(int predicate, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::meet_block("__syncthreads_or", site, cuemu::Vote::kAny, predicate);
}

inline void __syncwarp(unsigned mask = cuemu::kAllLanes, cuemu::Site site = cuemu::Site::here()) {
  cuemu::meet_warp("__syncwarp", site, mask, false, nullptr, cuemu::sync_all);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::shuffle("__shfl_sync", cuemu::Shuffle::kIndex, mask, value, lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::shuffle("__shfl_up_sync", cuemu::Shuffle::kUp, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::shuffle("__shfl_down_sync", cuemu::Shuffle::kDown, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::shuffle("__shfl_xor_sync", cuemu::Shuffle::kXor, mask, value, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuemu::Site site = cuemu::Site::here()) {
  return cuemu::combine("__ballot_sync", cuemu::Combine::kBallot, mask, predicate != 0, site);
}
inline int __all_sync(unsigned mask, int predicate, cuemu::Site site = cuemu::Site::here()) {
  return static_cast<int>(cuemu::combine("__all_sync", cuemu::Combine::kAll, mask, predicate != 0, site));
}
inline int __any_sync(unsigned mask, int predicate, cuemu::Site site = cuemu::Site::here()) {
  return static_cast<int>(cuemu::combine("__any_sync", cuemu::Combine::kAny, mask, predicate != 0, site));
}

// sm_80 and newer: kernels for sm_75 must not use them.
void cuemu_require_sm_80(const char* verb, cuemu::Site site);

template <typename T>
T __reduce_add_sync(unsigned mask, T value, cuemu::Site site = cuemu::Site::here()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  cuemu_require_sm_80("__reduce_add_sync", site);
  return std::bit_cast<T>(
      cuemu::combine("__reduce_add_sync", cuemu::Combine::kSum, mask, std::bit_cast<uint32_t>(value), site));
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, cuemu::Site site = cuemu::Site::here()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  cuemu_require_sm_80("__reduce_min_sync", site);
  constexpr auto kHow = std::is_signed_v<T> ? cuemu::Combine::kMin : cuemu::Combine::kMinUnsigned;
  return std::bit_cast<T>(cuemu::combine("__reduce_min_sync", kHow, mask, std::bit_cast<uint32_t>(value), site));
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, cuemu::Site site = cuemu::Site::here()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  cuemu_require_sm_80("__reduce_max_sync", site);
  constexpr auto kHow = std::is_signed_v<T> ? cuemu::Combine::kMax : cuemu::Combine::kMaxUnsigned;
  return std::bit_cast<T>(cuemu::combine("__reduce_max_sync", kHow, mask, std::bit_cast<uint32_t>(value), site));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, cuemu::Site site = cuemu::Site::here()) {
  cuemu_require_sm_80("__reduce_and_sync", site);
  return cuemu::combine("__reduce_and_sync", cuemu::Combine::kAnd, mask, value, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, cuemu::Site site = cuemu::Site::here()) {
  cuemu_require_sm_80("__reduce_or_sync", site);
  return cuemu::combine("__reduce_or_sync", cuemu::Combine::kOr, mask, value, site);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, cuemu::Site site = cuemu::Site::here()) {
  cuemu_require_sm_80("__reduce_xor_sync", site);
  return cuemu::combine("__reduce_xor_sync", cuemu::Combine::kXor, mask, value, site);
}
