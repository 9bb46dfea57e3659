// A thread beside the OpenMP team, for work that waits for a disk.
#pragma once

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <functional>

namespace qlora_native::cpu {

// It takes none of the process's signals but those of its own faults, and its stack is small: stacks count where memory
// is limited.
class SideThread {
 public:
  // The work must not throw.
  explicit SideThread(std::function<void()> work);
  ~SideThread() { join(); }
  SideThread(const SideThread&) = delete;
  SideThread& operator=(const SideThread&) = delete;

  bool runs() const { return runs_; }  // false if there was no room for a thread, on Windows, or after join()
  void join();

 private:
  std::function<void()> work_;
#if !defined(_WIN32)
  pthread_t thread_{};
#endif
  bool runs_ = false;
};

}  // namespace qlora_native::cpu
