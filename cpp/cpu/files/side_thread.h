// A thread beside the OpenMP team, for work that waits for a disk.
#pragma once

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/types.h>
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

  // False if there was no room for a thread, on Windows, after join(), and in a forked child, which has no such thread.
  bool runs() const;
  void join();  // if it runs

 private:
  std::function<void()> work_;
#if !defined(_WIN32)
  pthread_t thread_{};
  pid_t process_ = 0;  // whose thread it is
#endif
  bool runs_ = false;
};

}  // namespace qlora_native::cpu
