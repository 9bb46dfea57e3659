#include "cuda_on_cpu/async_copy.h"

#include <array>
#include <cstring>
#include <vector>

#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/race.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/shared_memory.h"

namespace cuemu {
namespace {

struct Flight {
  uint16_t thread_plus_1;  // 0: none
  Where where;
};

std::array<Flight, kArenaBytes / 16> flights;  // a slot for every 16 bytes of the arena
size_t num_in_flight = 0;

void land(const AsyncCopy& copy) {
  if (copy.num_bytes > 0 && std::memcmp(copy.value.data(), copy.global, static_cast<size_t>(copy.num_bytes)) != 0) {
    fail(copy.site, "cp.async: its source changed while the copy was in flight");
  }
  std::memcpy(copy.shared, copy.value.data(), 16);
  flights[arena_offset(copy.shared) / 16].thread_plus_1 = 0;
  --num_in_flight;
  note_shared(copy.shared, 16, Access::kWrite, Where::site(copy.site));
}

}  // namespace

void issue_copy(void* shared, const void* global, int num_bytes, Site site) {
  check_shared_16("cp.async", shared, site);
  if (num_bytes < 0 || num_bytes > 16) {
    fail(site, "cp.async: %d source bytes, expected 0 to 16", num_bytes);
  }
  AsyncCopy copy{static_cast<std::byte*>(shared), nullptr, {}, num_bytes, self->group, site};
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail_misaligned(Where::site(site), "cp.async: the global address lies %d bytes past a multiple of 16",
                    static_cast<int>(reinterpret_cast<uintptr_t>(global) % 16));
  }
  if (num_bytes > 0) {
    if (is_shared(global)) {
      fail(site, "cp.async: the source is in shared memory");
    }
    check_global(global, static_cast<size_t>(num_bytes), Access::kRead, "cp.async", Where::site(site));
    copy.global = global;
    std::memcpy(copy.value.data(), global, static_cast<size_t>(num_bytes));
  }
  ++counters().async_copies;
  note_shared(shared, 16, Access::kWrite, Where::site(site));
  if (device().sm < 80) {  // there the thread copies by itself
    std::memcpy(shared, copy.value.data(), 16);
    return;
  }
  std::memset(shared, kUnwritten, 16);
  flights[arena_offset(shared) / 16] = {static_cast<uint16_t>(self->linear + 1), Where::site(site)};
  ++num_in_flight;
  self->copies.push_back(copy);
}

void commit_copies() { ++self->group; }

void wait_for_copies(int pending_groups, Site site) {
  if (pending_groups < 0) {
    fail(site, "cp_async_wait<%d>", pending_groups);
  }
  std::vector<AsyncCopy>& copies = self->copies;
  size_t landed = 0;
  while (landed < copies.size() && copies[landed].group + static_cast<uint32_t>(pending_groups) < self->group) {
    land(copies[landed++]);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(landed));
}

void check_not_in_flight(const void* address, size_t num_bytes, Where where) {
  if (num_in_flight == 0 || num_bytes == 0) {
    return;
  }
  const size_t begin = arena_offset(address);
  for (size_t slot = begin / 16; slot <= (begin + num_bytes - 1) / 16; ++slot) {
    if (flights[slot].thread_plus_1 != 0) {
      fail(where, "access to %p while the cp.async of thread %d at %s is in flight to it", address,
           flights[slot].thread_plus_1 - 1, words(flights[slot].where).c_str());
    }
  }
}

void fail_unwaited_copy() {
  fail(self->copies.front().site, "cp.async: the thread ends without having waited for this copy (%zu in flight)",
       self->copies.size());
}

void forget_copies() {
  if (num_in_flight != 0) {
    flights.fill({});
    num_in_flight = 0;
  }
}

}  // namespace cuemu
