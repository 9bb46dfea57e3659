#include "cuda_on_cpu/global_memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <new>

#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/sanitizers.h"

namespace cuemu {
namespace {

constexpr int kRedZoneByte = 0xa5;
constexpr int kUnwritten = 0xff;
constexpr size_t kPage = 4096;
constexpr size_t kGuard = 64 * 1024;  // bytes on either side that fault: for what jumps over a red zone
constexpr size_t kFreedKept = 1024;   // allocations whose addresses stay taken after they are freed

// memory: guard, red zone, the bytes, red zone of at least kRedZone up to the end of a page, guard.
struct Allocation {
  size_t num_bytes;
  size_t head_bytes;  // of the red zone before them
  std::byte* memory;
  size_t total_bytes;
  int owner;

  std::byte* begin() const { return memory + kGuard + head_bytes; }
  std::byte* end() const { return begin() + num_bytes; }
  size_t tail_bytes() const { return total_bytes - 2 * kGuard - head_bytes - num_bytes; }
};

std::map<uintptr_t, Allocation>& allocations() {
  static std::map<uintptr_t, Allocation> all;
  return all;
}

std::deque<Allocation> freed;
bool is_closed_to_host = false;
bool is_open = true;

void protect(const Allocation& allocation, int protection) {
  mprotect(allocation.memory + kGuard, allocation.total_bytes - 2 * kGuard, protection);
}

bool may_be_closed(const Allocation& allocation) { return allocation.owner != kEveryDevice; }  // managed.h closes those

void protect_all(int protection) {
  for (const auto& [begin, allocation] : allocations()) {
    if (may_be_closed(allocation)) {
      protect(allocation, protection);
    }
  }
}

// That `address` lies in; null if there is none.
const Allocation* find_allocation(const void* address) {
  const Range* range = range_of(address);
  const auto found = range != nullptr ? allocations().find(range->begin) : allocations().end();
  return found != allocations().end() ? &found->second : nullptr;
}

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
// The instruction that faulted, as a return address behind it.
const void* after_instruction([[maybe_unused]] const void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__aarch64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc + 1);
#else
  return nullptr;
#endif
}

struct sigaction before{};  // who handled faults

// Of a kernel: its launch ends, and the process goes on.
void handle_fault(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const Where where = Where::instruction(after_instruction(context));
  sigset_t unblocked;
  sigemptyset(&unblocked);
  sigaddset(&unblocked, signal);
  pthread_sigmask(SIG_UNBLOCK, &unblocked, nullptr);  // this handler may not return
  for (const auto& [begin, allocation] : allocations()) {
    const auto memory = reinterpret_cast<uintptr_t>(allocation.memory);
    if (address >= memory && address < memory + allocation.total_bytes) {
      const char* side = address < begin ? "before the begin" : "past the end";
      if (self != nullptr) {
        fail_illegal(where, "access %s of a device allocation of %zu bytes", side, allocation.num_bytes);
      }
      std::fprintf(stderr, "cuda_on_cpu: access %s of a device allocation of %zu bytes\n", side, allocation.num_bytes);
    }
  }
  if (range_of(info->si_addr) == nullptr &&
      (before.sa_flags & SA_SIGINFO) != 0) {  // another emulator's of this process, say
    before.sa_sigaction(signal, info, context);
    return;
  }
  fail_fault(info->si_addr, where);
  std::signal(signal, SIG_DFL);  // the instruction faults again and ends the process
}

#endif

}  // namespace

void catch_faults() {
#if !defined(CUEMU_ASAN)
  static const bool caught = [] {
    static std::byte stack[64 * 1024];
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof(stack);
    sigaltstack(&alternate, nullptr);
    struct sigaction action{};
    action.sa_sigaction = handle_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGSEGV, &action, &before) == 0;
  }();
  (void)caught;
#endif
}

void* allocate_global(size_t num_bytes, size_t offset_bytes, size_t alignment, int owner) {
  catch_faults();
  const size_t inner = (alignment + offset_bytes + num_bytes + kRedZone + kPage - 1) / kPage * kPage;
  Allocation added{num_bytes, 0, nullptr, inner + 2 * kGuard, owner};
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
  add_range(added.begin(), num_bytes, owner == kEveryDevice ? Kind::kManaged : Kind::kDevice, owner);
  if (!is_open && may_be_closed(added)) {
    protect(added, PROT_NONE);
  }
  return added.begin();
}

bool free_global(void* address) {
  const auto found = allocations().find(reinterpret_cast<uintptr_t>(address));
  if (found == allocations().end()) {
    return false;
  }
  set_red_zones(found->second, false);
  add_range(found->second.begin(), found->second.num_bytes, Kind::kFreed);
  if (!may_be_closed(found->second)) {
    munmap(found->second.memory, found->second.total_bytes);
    allocations().erase(found);
    return true;
  }
  // New memory in the place of the old gives its pages back.
  mmap(found->second.memory, found->second.total_bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  freed.push_back(found->second);
  allocations().erase(found);
  if (freed.size() > kFreedKept) {
    forget_range(freed.front().begin());
    munmap(freed.front().memory, freed.front().total_bytes);
    freed.pop_front();
  }
  return true;
}

size_t allocated_bytes() {
  size_t sum = 0;
  for (const auto& [begin, allocation] : allocations()) {
    sum += allocation.owner == current_device() ? allocation.num_bytes : 0;
  }
  return sum;
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

void set_closed_to_host(bool closed) {
  open_device_memory();
  is_closed_to_host = closed;
  close_device_memory();
}

void open_device_memory() {
  if (!is_open) {
    protect_all(PROT_READ | PROT_WRITE);
  }
  is_open = true;
}

void close_device_memory() {
  if (is_closed_to_host) {
    protect_all(PROT_NONE);
    is_open = false;
  }
}

bool report_host_touch(void* address) {
  const Allocation* touched = is_open ? nullptr : find_allocation(address);
  if (touched == nullptr || !may_be_closed(*touched)) {
    return false;
  }
  add_report("the host touches byte " + std::to_string(static_cast<std::byte*>(address) - touched->begin()) + " of " +
             std::to_string(touched->num_bytes) + " bytes of memory of device " + std::to_string(touched->owner));
  protect(*touched, PROT_READ | PROT_WRITE);
  return true;
}

void copy_bytes(void* to, const void* from, size_t num_bytes) {
  open_device_memory();
  std::memcpy(to, from, num_bytes);
  close_device_memory();
}

void fill_bytes(void* to, int value, size_t num_bytes) {
  open_device_memory();
  std::memset(to, value, num_bytes);
  close_device_memory();
}

}  // namespace cuemu
