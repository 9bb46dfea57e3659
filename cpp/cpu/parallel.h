// Loops over the threads of the OpenMP runtime that torch loaded, as many as torch would use. The one file that uses
// OpenMP. Built without it (as the cross builds for macOS and Windows and the build for ThreadSanitizer are), every
// loop runs on the calling thread.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <atomic>
#include <cstdint>
#include <exception>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include "cpu/isa/fpcr.h"
#endif

namespace qlora_native::cpu {

// Subnormals count: torch.set_flush_denormal(True) must not change the bytes that we write.
class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kFlushBits); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushBits = 0x8040;  // flush-to-zero, denormals-are-zero
  unsigned saved_;

 public:
#elif defined(__aarch64__)
  IeeeArithmetic() : saved_(read_fpcr()) { write_fpcr(saved_ & ~kFlushBits); }
  ~IeeeArithmetic() { write_fpcr(saved_); }

 private:
  uint64_t saved_;

 public:
#else
  IeeeArithmetic() = default;
  ~IeeeArithmetic() {}
#endif
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;
};

// How many threads torch's own ops use on the calling thread: torch passes torch.set_num_threads on to the OpenMP
// runtime, but on a thread other than the one that called it, not before the first op of torch's. Null: what the
// runtime says.
inline std::atomic<int (*)()> threads_of_torch{nullptr};

// How many threads a loop may use here and now; in a loop, how many run it and which of them this one is.
#if defined(_OPENMP)
inline int64_t available_threads() {
  int (*const of_torch)() = threads_of_torch.load(std::memory_order_relaxed);
  return omp_in_parallel() ? 1 : of_torch != nullptr ? of_torch() : omp_get_max_threads();
}
inline int64_t team_size() { return omp_get_num_threads(); }
inline int64_t thread_number() { return omp_get_thread_num(); }
#else
inline int64_t available_threads() { return 1; }
inline int64_t team_size() { return 1; }
inline int64_t thread_number() { return 0; }
#endif

inline constexpr int64_t kProductsPerTask = 1 << 15;  // multiplications that are worth a thread

// Calls work() on each thread of a team. The first exception is thrown again on the caller's thread: one that left the
// team would end the process.
template <typename Work>
void on_team([[maybe_unused]] int num_threads, const Work& work) {
  std::exception_ptr first;
  std::atomic_flag failed;
#pragma omp parallel num_threads(num_threads)
  {
    try {
      const IeeeArithmetic ieee;
      work();
    } catch (...) {
      if (!failed.test_and_set()) {
        first = std::current_exception();
      }
    }
  }
  if (first) {
    std::rethrow_exception(first);
  }
}

// Calls body(begin, end) over disjoint ranges that cover [0, total). A range is at least `grain` items long, so that
// small work stays on one thread. The body's result must not depend on where the cuts fall.
template <typename Body>
void parallel_for(int64_t total, int64_t grain, const Body& body) {
  if (total <= 0) {
    return;
  }
  const int64_t wanted = (total + grain - 1) / grain;
  const int64_t available = available_threads();
  const int num_threads = static_cast<int>(wanted < available ? wanted : available);
  if (num_threads <= 1) {
    const IeeeArithmetic ieee;
    body(int64_t{0}, total);
    return;
  }
  on_team(num_threads, [&] {
    const int64_t team = team_size();
    const int64_t me = thread_number();
    const int64_t begin = total / team * me + (me < total % team ? me : total % team);
    const int64_t length = total / team + (me < total % team ? 1 : 0);
    if (length > 0) {
      body(begin, begin + length);
    }
  });
}

// How many threads parallel_units uses for so many units.
inline int64_t unit_threads(int64_t total) {
  const int64_t available = available_threads();
  return total < 1 ? 1 : total < available ? total : available;
}

// Calls body(unit, thread) for each unit in [0, total), 0 <= thread < unit_threads(total). Each thread takes the next
// unit when it has finished one, so that slow cores and busy ones do fewer. The body's result must not depend on which
// thread runs it.
template <typename Body>
void parallel_units(int64_t total, const Body& body) {
  const int num_threads = static_cast<int>(unit_threads(total));
  if (num_threads <= 1) {
    const IeeeArithmetic ieee;
    for (int64_t unit = 0; unit < total; ++unit) {
      body(unit, int64_t{0});
    }
    return;
  }
  std::atomic<int64_t> next{0};
  on_team(num_threads, [&] {
    const int64_t thread = thread_number();
    for (int64_t unit = next.fetch_add(1, std::memory_order_relaxed); unit < total;
         unit = next.fetch_add(1, std::memory_order_relaxed)) {
      body(unit, thread);
    }
  });
}

}  // namespace qlora_native::cpu
