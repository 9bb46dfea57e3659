#include "cpu/files/side_thread.h"

#if !defined(_WIN32)
#include <signal.h>
#include <unistd.h>
#endif

#include <initializer_list>
#include <utility>

namespace qlora_native::cpu {

#if defined(_WIN32)

// Without a page file there is no disk to wait for.
SideThread::SideThread(std::function<void()> work) : work_(std::move(work)) {}
bool SideThread::runs() const { return false; }
void SideThread::join() {}

#else

SideThread::SideThread(std::function<void()> work) : work_(std::move(work)), process_(getpid()) {
  constexpr size_t kStack = 256 << 10;  // bytes
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) {
    return;
  }
  pthread_attr_setstacksize(&attributes, kStack);
  sigset_t blocked;
  sigset_t before;
  sigfillset(&blocked);
  for (const int own : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) {  // of a blocked one no handler would say anything
    sigdelset(&blocked, own);
  }
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  const auto run = [](void* self) -> void* {
    static_cast<SideThread*>(self)->work_();
    return nullptr;
  };
  runs_ = pthread_create(&thread_, &attributes, run, this) == 0;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
}

bool SideThread::runs() const { return runs_ && getpid() == process_; }

void SideThread::join() {
  if (runs()) {
    pthread_join(thread_, nullptr);
  }
  runs_ = false;
}

#endif

}  // namespace qlora_native::cpu
