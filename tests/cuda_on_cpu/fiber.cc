#include "cuda_on_cpu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "cuda_on_cpu/sanitizers.h"

namespace cuemu {
namespace {

#if defined(CUEMU_ASAN)
constexpr size_t kStackBytes = 512 * 1024;  // instrumented frames are larger
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;

Fiber* running = nullptr;

#if defined(__x86_64__)
void* scheduler_stack_pointer = nullptr;
#else
ucontext_t scheduler_context;
#endif

#if defined(CUEMU_ASAN)
const void* scheduler_bottom = nullptr;
size_t scheduler_bytes = 0;
void* scheduler_kept = nullptr;
#endif

}  // namespace

#if defined(__x86_64__)
// The callee-saved registers of the System V ABI go onto the stack that is left and come from the one that is entered.
extern "C" void cuemu_switch(void** left, void* entered);
asm(R"(
.text
.globl cuemu_switch
.hidden cuemu_switch
.type cuemu_switch, @function
cuemu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuemu_switch, .-cuemu_switch
)");
#endif

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  mprotect(memory, kGuardBytes, PROT_NONE);  // an overflow faults instead of reaching a neighbor
  memory_ = static_cast<std::byte*>(memory);
  static size_t count = 0;  // tops at one offset of a page would all meet in the same cache lines
  top_ = memory_ + kGuardBytes + kStackBytes - 64 - 192 * (count++ % 16);
}

Fiber::~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  kept_ = nullptr;
#if defined(CUEMU_ASAN)
  __asan_unpoison_memory_region(memory_ + kGuardBytes, kStackBytes);  // frames of a run that was ended
#endif
#if defined(__x86_64__)
  uintptr_t* slot = reinterpret_cast<uintptr_t*>(top_);
  *--slot = 0;  // the return address that run() never uses; with it the stack is aligned as after a call
  *--slot = reinterpret_cast<uintptr_t>(&Fiber::run);
  slot -= 6;
  std::memset(slot, 0, 6 * sizeof(uintptr_t));
  stack_pointer_ = slot;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = memory_ + kGuardBytes;
  context_.uc_stack.ss_size = static_cast<size_t>(top_ - memory_) - kGuardBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::run, 0);
#endif
}

void Fiber::resume() {
  running = this;
#if defined(CUEMU_ASAN)
  __sanitizer_start_switch_fiber(&scheduler_kept, memory_ + kGuardBytes, kStackBytes);
#endif
#if defined(__x86_64__)
  cuemu_switch(&scheduler_stack_pointer, stack_pointer_);
#else
  swapcontext(&scheduler_context, &context_);
#endif
#if defined(CUEMU_ASAN)
  __sanitizer_finish_switch_fiber(scheduler_kept, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::switch_to_scheduler([[maybe_unused]] bool for_good) {
  Fiber* self = running;
#if defined(CUEMU_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->kept_, scheduler_bottom, scheduler_bytes);
#endif
#if defined(__x86_64__)
  cuemu_switch(&self->stack_pointer_, scheduler_stack_pointer);
#else
  swapcontext(&self->context_, &scheduler_context);
#endif
#if defined(CUEMU_ASAN)
  __sanitizer_finish_switch_fiber(self->kept_, &scheduler_bottom, &scheduler_bytes);
#endif
}

void Fiber::yield() { switch_to_scheduler(false); }

void Fiber::leave() {
  switch_to_scheduler(true);
  __builtin_unreachable();
}

void Fiber::run() {
#if defined(CUEMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
  running->entry_();
  leave();
}

}  // namespace cuemu
