#include "cuda_on_cpu/page_guard.h"

#include <sys/mman.h>

#include <csignal>

namespace cuemu {
namespace {

bool (*asked)(void* address) = nullptr;
struct sigaction before{};

void handle(int signal, siginfo_t* info, void* context) {
  if (asked(info->si_addr)) {
    return;
  }
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, info, context);
  } else {
    std::signal(signal, SIG_DFL);  // the instruction faults again and ends the process
  }
}

}  // namespace

void close_pages(void* begin, size_t num_bytes) { mprotect(begin, num_bytes, PROT_NONE); }

void open_pages(void* begin, size_t num_bytes) { mprotect(begin, num_bytes, PROT_READ | PROT_WRITE); }

bool reserve_pages(void* begin, size_t num_bytes) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
  return mmap(begin, num_bytes, PROT_NONE, kFlags, -1, 0) == begin;
}

void feel_touches(bool (*feels)(void* address)) {
  asked = feels;
  static const bool handled = [] {
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;  // a fiber may have run out of stack
    return sigaction(SIGSEGV, &action, &before) == 0;
  }();
  (void)handled;
}

}  // namespace cuemu
