#include "cuda_on_cpu/global_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <new>

#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/sanitizers.h"

namespace cuemu {
namespace {

constexpr int kRedZoneByte = 0xa5;
constexpr int kUnwritten = 0xff;

struct Allocation {
  size_t num_bytes;
  std::byte* memory;  // with the red zones
};

std::map<uintptr_t, Allocation>& allocations() {
  static std::map<uintptr_t, Allocation> all;
  return all;
}

size_t total = 0;

bool is_intact(const std::byte* zone, size_t num_bytes) {
  return std::all_of(zone, zone + num_bytes, [](std::byte value) { return value == std::byte{kRedZoneByte}; });
}

void set_red_zones([[maybe_unused]] uintptr_t address, [[maybe_unused]] const Allocation& allocation,
                   [[maybe_unused]] bool poisoned) {
#if defined(CUEMU_ASAN)
  std::byte* begin = reinterpret_cast<std::byte*>(address);
  std::byte* end = begin + allocation.num_bytes;
  if (poisoned) {
    ASAN_POISON_MEMORY_REGION(begin - kRedZone, kRedZone);
    ASAN_POISON_MEMORY_REGION(end, kRedZone);
  } else {
    ASAN_UNPOISON_MEMORY_REGION(begin - kRedZone, allocation.num_bytes + 2 * kRedZone);
  }
#endif
}

}  // namespace

void* allocate_global(size_t num_bytes) {
  auto* memory = static_cast<std::byte*>(::operator new(num_bytes + 2 * kRedZone, std::align_val_t{kRedZone}));
  std::byte* begin = memory + kRedZone;
  std::memset(memory, kRedZoneByte, kRedZone);
  std::memset(begin, kUnwritten, num_bytes);
  std::memset(begin + num_bytes, kRedZoneByte, kRedZone);
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const Allocation& added = allocations()[address] = {num_bytes, memory};
  set_red_zones(address, added, true);
  total += num_bytes;
  return begin;
}

bool free_global(void* address) {
  const auto found = allocations().find(reinterpret_cast<uintptr_t>(address));
  if (found == allocations().end()) {
    return false;
  }
  set_red_zones(found->first, found->second, false);
  total -= found->second.num_bytes;
  ::operator delete(found->second.memory, std::align_val_t{kRedZone});
  allocations().erase(found);
  return true;
}

bool is_global(const void* address) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  const auto after = allocations().upper_bound(wanted);
  return after != allocations().begin() && wanted - std::prev(after)->first < std::prev(after)->second.num_bytes;
}

size_t allocated_bytes() { return total; }

void check_global(const void* address, size_t num_bytes, const char* verb, Site site) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  const auto after = allocations().upper_bound(wanted);
  if (after != allocations().end() && wanted + num_bytes > after->first - kRedZone) {
    fail(site, "%s: %zu bytes that begin %zu bytes before a device allocation", verb, num_bytes,
         static_cast<size_t>(after->first - wanted));
  }
  if (after == allocations().begin()) {
    return;
  }
  const auto& [begin, allocation] = *std::prev(after);
  const uintptr_t end = begin + allocation.num_bytes;
  if (wanted < end + kRedZone && wanted + num_bytes > end) {
    fail(site, "%s: %zu bytes at byte %zu of a device allocation of %zu bytes", verb, num_bytes,
         static_cast<size_t>(wanted - begin), allocation.num_bytes);
  }
}

std::string overwritten_red_zone() {
#if !defined(CUEMU_ASAN)  // which reports the write itself
  for (const auto& [begin, allocation] : allocations()) {
    const std::byte* before = allocation.memory;
    const std::byte* after = before + kRedZone + allocation.num_bytes;
    if (!is_intact(before, kRedZone) || !is_intact(after, kRedZone)) {
      const bool at_end = is_intact(before, kRedZone);
      set_red_zones(begin, allocation, false);
      std::memset(allocation.memory, kRedZoneByte, kRedZone);  // told once
      std::memset(allocation.memory + kRedZone + allocation.num_bytes, kRedZoneByte, kRedZone);
      return "a kernel wrote " + std::string(at_end ? "past the end" : "before the begin") +
             " of a device allocation of " + std::to_string(allocation.num_bytes) + " bytes";
    }
  }
#endif
  return {};
}

}  // namespace cuemu
