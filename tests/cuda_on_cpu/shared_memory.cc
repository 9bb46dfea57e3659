#include "cuda_on_cpu/shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/sanitizers.h"

namespace cuemu {
namespace {

constexpr size_t kGap = 256;
constexpr size_t kAlignment = 128;

struct Region {
  const void* key;  // null: dynamic memory
  const char* name;
  size_t begin;  // in the arena
  size_t num_bytes;
};

std::vector<Region> regions;
size_t arena_used = 0;

void set_accessible([[maybe_unused]] size_t begin, [[maybe_unused]] size_t num_bytes,
                    [[maybe_unused]] bool accessible) {
#if defined(CUEMU_ASAN)
  if (accessible) {
    ASAN_UNPOISON_MEMORY_REGION(shared_arena + begin, num_bytes);
  } else {
    ASAN_POISON_MEMORY_REGION(shared_arena + begin, num_bytes);
  }
#endif
}

void* add_region(const void* key, const char* name, size_t num_bytes, size_t align) {
  size_t begin = (arena_used + 2 * kGap + kAlignment - 1) / kAlignment * kAlignment;
  if (align < kAlignment) {
    begin += align;  // a multiple of what was asked for and of nothing larger
  }
  if (begin + num_bytes + kGap > kArenaBytes) {
    throw std::bad_alloc();
  }
  arena_used = begin + num_bytes;
  regions.push_back({key, name, begin, num_bytes});
  set_accessible(begin, num_bytes, true);
  std::memset(shared_arena + begin, kUnwritten, num_bytes);
#if !defined(CUEMU_ASAN)
  std::memset(shared_arena + begin - kGap, kUnwritten, kGap);
  std::memset(shared_arena + begin + num_bytes, kUnwritten, kGap);
#endif
  return shared_arena + begin;
}

const Region* region_around(size_t offset) {
  const Region* nearest = nullptr;
  for (const Region& region : regions) {
    if (offset + kGap >= region.begin && offset < region.begin + region.num_bytes + kGap) {
      nearest = &region;
      if (offset >= region.begin && offset < region.begin + region.num_bytes) {
        return nearest;
      }
    }
  }
  return nearest;
}

}  // namespace

void begin_shared(size_t dynamic_bytes) {
  if (shared_arena == nullptr) {
    void* memory =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    shared_arena = static_cast<std::byte*>(memory);
  }
  end_shared();
  add_region(nullptr, "dynamic shared memory", dynamic_bytes, kAlignment);
}

void refill_shared() {
  for (const Region& region : regions) {
    std::memset(shared_arena + region.begin, kUnwritten, region.num_bytes);
  }
}

std::string overrun_region() {
#if !defined(CUEMU_ASAN)  // which reports the write itself
  for (const Region& region : regions) {
    const std::byte* begin = shared_arena + region.begin;
    const auto is_unwritten = [](std::byte value) { return value == std::byte{kUnwritten}; };
    if (!std::all_of(begin - kGap, begin, is_unwritten) ||
        !std::all_of(begin + region.num_bytes, begin + region.num_bytes + kGap, is_unwritten)) {
      return "a kernel wrote around " + std::string(region.name) + ", which has " + std::to_string(region.num_bytes) +
             " bytes";
    }
  }
#endif
  return {};
}

void end_shared() {
  regions.clear();
  arena_used = 0;
  set_accessible(0, kArenaBytes, false);
}

void* dynamic_shared(size_t align, Site site) {
  if (kAlignment % align != 0) {
    fail(site, "dyn_smem for a type aligned to %zu bytes: the memory is aligned to %zu", align, kAlignment);
  }
  return shared_arena + regions.front().begin;
}

void* shared_array(const void* key, const char* name, size_t num_bytes, size_t align, Site site) {
  size_t total = num_bytes;
  for (const Region& region : regions) {
    if (region.key == key) {
      return shared_arena + region.begin;
    }
    total += region.num_bytes;
  }
  const size_t most = device().shared_bytes_per_block;
  if (total > most) {
    fail(site, "shared array %s brings the block to %zu bytes of shared memory, but sm_%d allows %zu", name, total,
         device().sm, most);
  }
  return add_region(key, name, num_bytes, align);
}

void check_within_shared(const void* address, size_t num_bytes, Where where) {
  const size_t offset = arena_offset(address);
  const Region* region = region_around(offset);
  if (region == nullptr) {
    fail(where, "access of %zu bytes at %p, which is in no shared array", num_bytes, address);
  }
  if (offset < region->begin || offset + num_bytes > region->begin + region->num_bytes) {
    fail(where, "access of %zu bytes at byte %td of %s, which has %zu bytes", num_bytes,
         static_cast<ptrdiff_t>(offset) - static_cast<ptrdiff_t>(region->begin), region->name, region->num_bytes);
  }
}

void check_shared_16(const char* verb, const void* address, Site site) {
  if (!is_shared(address)) {
    fail(site, "%s: %p is no address in shared memory", verb, address);
  }
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(site, "%s: the shared address lies %d bytes past a multiple of 16", verb,
         static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16));
  }
  check_within_shared(address, 16, Where::site(site));
}

}  // namespace cuemu
