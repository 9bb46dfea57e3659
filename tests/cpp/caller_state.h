// What the caller's thread may bring along: flags that flush subnormals, a number of OpenMP threads.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include "cpu/isa/fpcr.h"
#endif

// Sets flush-to-zero and denormals-are-zero for its lifetime, as torch.set_flush_denormal(True) does.
class FlushesSubnormals {
 public:
#if defined(__x86_64__)
  FlushesSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlush); }
  ~FlushesSubnormals() { _mm_setcsr(saved_); }
  bool still() const { return (_mm_getcsr() & kFlush) == kFlush; }

 private:
  static constexpr unsigned kFlush = 0x8040;
  unsigned saved_;

 public:
#elif defined(__aarch64__)
  FlushesSubnormals() : saved_(qlora_native::cpu::read_fpcr()) { qlora_native::cpu::write_fpcr(saved_ | kFlush); }
  ~FlushesSubnormals() { qlora_native::cpu::write_fpcr(saved_); }
  bool still() const { return (qlora_native::cpu::read_fpcr() & kFlush) == kFlush; }

 private:
  static constexpr uint64_t kFlush = 1u << 24;  // FZ
  uint64_t saved_;

 public:
#else
  FlushesSubnormals() = default;
  ~FlushesSubnormals() {}
  bool still() const { return true; }
#endif
  FlushesSubnormals(const FlushesSubnormals&) = delete;
  FlushesSubnormals& operator=(const FlushesSubnormals&) = delete;
};

class Threads {
 public:
#if defined(_OPENMP)
  explicit Threads(int count) : saved_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(saved_); }

 private:
  int saved_;

 public:
#else
  explicit Threads(int) {}
  ~Threads() {}
#endif
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
};
