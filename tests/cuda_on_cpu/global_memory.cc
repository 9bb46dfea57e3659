#include "cuda_on_cpu/global_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>

#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/sanitizers.h"

namespace cuemu {
namespace {

constexpr int kRedZoneByte = 0xa5;
constexpr int kUnwritten = 0xff;
constexpr size_t kPage = 4096;
constexpr size_t kGuard = 64 * 1024;  // bytes on either side that fault: for what jumps over a red zone

// memory: guard, red zone, the bytes, red zone of at least kRedZone up to the end of a page, guard.
struct Allocation {
  size_t num_bytes;
  size_t head_bytes;  // of the red zone before them
  std::byte* memory;
  size_t total_bytes;

  std::byte* begin() const { return memory + kGuard + head_bytes; }
  std::byte* end() const { return begin() + num_bytes; }
  size_t tail_bytes() const { return total_bytes - 2 * kGuard - head_bytes - num_bytes; }
};

std::map<uintptr_t, Allocation>& allocations() {
  static std::map<uintptr_t, Allocation> all;
  return all;
}

size_t total = 0;

[[maybe_unused]] bool is_intact(const std::byte* zone, size_t num_bytes) {
  return std::all_of(zone, zone + num_bytes, [](std::byte value) { return value == std::byte{kRedZoneByte}; });
}

void set_red_zones([[maybe_unused]] const Allocation& allocation, [[maybe_unused]] bool poisoned) {
#if defined(CUEMU_ASAN)
  if (poisoned) {
    ASAN_POISON_MEMORY_REGION(allocation.begin() - allocation.head_bytes, allocation.head_bytes);
    ASAN_POISON_MEMORY_REGION(allocation.end(), allocation.tail_bytes());
  } else {
    ASAN_UNPOISON_MEMORY_REGION(allocation.begin() - allocation.head_bytes,
                                allocation.head_bytes + allocation.num_bytes + allocation.tail_bytes());
  }
#endif
}

void fill_red_zones(const Allocation& allocation) {
  std::memset(allocation.begin() - allocation.head_bytes, kRedZoneByte, allocation.head_bytes);
  std::memset(allocation.end(), kRedZoneByte, allocation.tail_bytes());
}

#if !defined(CUEMU_ASAN)
void tell_fault(int signal, siginfo_t* info, void*) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const auto& [begin, allocation] : allocations()) {
    const auto memory = reinterpret_cast<uintptr_t>(allocation.memory);
    if (address >= memory && address < memory + allocation.total_bytes) {
      std::fprintf(stderr, "cuda_on_cpu: access %s of a device allocation of %zu bytes\n",
                   address < begin ? "before the begin" : "past the end", allocation.num_bytes);
    }
  }
  std::signal(signal, SIG_DFL);  // the instruction faults again and ends the process
}

// A fiber may have run out of stack, so the handler has one of its own.
void catch_faults() {
  static const bool caught = [] {
    static std::byte stack[64 * 1024];
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof(stack);
    sigaltstack(&alternate, nullptr);
    struct sigaction action{};
    action.sa_sigaction = tell_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGSEGV, &action, nullptr) == 0;
  }();
  (void)caught;
}
#endif

}  // namespace

void* allocate_global(size_t num_bytes, size_t offset_bytes, size_t alignment) {
#if !defined(CUEMU_ASAN)
  catch_faults();
#endif
  const size_t inner = (alignment + offset_bytes + num_bytes + kRedZone + kPage - 1) / kPage * kPage;
  Allocation added{num_bytes, 0, nullptr, inner + 2 * kGuard};
  void* memory = mmap(nullptr, added.total_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  added.memory = static_cast<std::byte*>(memory);
  const auto first = reinterpret_cast<uintptr_t>(added.memory) + kGuard;
  added.head_bytes = (first + kRedZone + alignment - 1) / alignment * alignment - first + offset_bytes;
  mprotect(added.memory + kGuard, inner, PROT_READ | PROT_WRITE);
  fill_red_zones(added);
  std::memset(added.begin(), kUnwritten, num_bytes);
  set_red_zones(added, true);
  allocations()[reinterpret_cast<uintptr_t>(added.begin())] = added;
  total += num_bytes;
  return added.begin();
}

bool free_global(void* address) {
  const auto found = allocations().find(reinterpret_cast<uintptr_t>(address));
  if (found == allocations().end()) {
    return false;
  }
  set_red_zones(found->second, false);
  total -= found->second.num_bytes;
  munmap(found->second.memory, found->second.total_bytes);
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
    const bool begin_intact = is_intact(allocation.begin() - allocation.head_bytes, allocation.head_bytes);
    if (!begin_intact || !is_intact(allocation.end(), allocation.tail_bytes())) {
      fill_red_zones(allocation);  // reported once
      return "a kernel wrote " + std::string(begin_intact ? "past the end" : "before the begin") +
             " of a device allocation of " + std::to_string(allocation.num_bytes) + " bytes";
    }
  }
#endif
  return {};
}

}  // namespace cuemu
