// A CUDA thread's stack and registers. A fiber runs until it yields; the scheduler's own stack runs in between.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuemu {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls `entry`, which must not return before the last one. What the fiber did before is forgotten.
  void start(void (*entry)());

  // From the scheduler: comes back when the fiber yields.
  void resume();

  // Whether `address` lies on its stack.
  bool holds(const void* address) const {
    return address >= static_cast<const void*>(memory_) && address < static_cast<const void*>(top_);
  }

  // From the running fiber: comes back when it is resumed.
  static void yield();

  // From the running fiber, which will not be resumed before it is started again.
  [[noreturn]] static void leave();

 private:
  static void run();
  static void switch_to_scheduler(bool for_good);

  void (*entry_)() = nullptr;
  std::byte* memory_;
  std::byte* top_;
  void* kept_ = nullptr;  // AddressSanitizer's word about this stack
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace cuemu
