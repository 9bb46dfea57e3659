#include "cpu/files/bus_error.h"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <memory>
#include <new>

namespace qlora_native::cpu {

namespace {

constexpr int kUserError = 2;  // the exit code of what the user can mend

// Others follow once these are taken. None is ever given back, so that the handler meets no memory that is gone.
struct Places {
  std::array<std::atomic<const BusErrorSentence*>, 256> sentences{};
  std::atomic<Places*> next{nullptr};
};

Places first_places;
struct sigaction handler_before;
std::atomic<int> written{0};  // 1 while a thread writes its sentence, 2 behind it

// Threads often meet the same lost pages at once: one sentence is enough, and none ends the process before it.
void write_once(const std::string& sentence) {
  int none = 0;
  if (written.compare_exchange_strong(none, 1)) {
    [[maybe_unused]] const ssize_t length = write(STDERR_FILENO, sentence.data(), sentence.size());
    written = 2;
  }
  while (written != 2) {
  }
}

const BusErrorSentence* sentence_for(const void* address) {
  for (const Places* places = &first_places; places != nullptr; places = places->next) {
    for (const auto& place : places->sentences) {
      const BusErrorSentence* const listed = place;
      if (listed != nullptr && address >= listed->begin && address < listed->end) {
        return listed;
      }
    }
  }
  return nullptr;
}

void on_bus_error(int, siginfo_t* info, void*) {
  if (const BusErrorSentence* const listed = sentence_for(info->si_addr)) {
    write_once(listed->sentence);
    if (listed->ends_process) {
      _exit(kUserError);
    }
  }
  sigaction(SIGBUS, &handler_before, nullptr);  // which the same fault meets next
  if (info->si_code <= 0) {                     // sent by a process: it does not come again
    raise(SIGBUS);
  }
}

}  // namespace

bool list(const BusErrorSentence& sentence) {
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGBUS, &action, &handler_before) == 0;
  }();
  if (!installed) {
    return true;  // there is nobody who would print it
  }
  for (Places* places = &first_places;; places = places->next) {
    for (auto& place : places->sentences) {
      const BusErrorSentence* none = nullptr;
      if (place.compare_exchange_strong(none, &sentence)) {
        return true;
      }
    }
    if (places->next == nullptr) {
      std::unique_ptr<Places> more(new (std::nothrow) Places);
      if (more == nullptr) {
        return false;
      }
      Places* none = nullptr;
      if (places->next.compare_exchange_strong(none, more.get())) {
        static_cast<void>(more.release());  // else another thread was first
      }
    }
  }
}

void unlist(const BusErrorSentence& sentence) {
  for (Places* places = &first_places; places != nullptr; places = places->next) {
    for (auto& place : places->sentences) {
      const BusErrorSentence* listed = &sentence;
      if (place.compare_exchange_strong(listed, nullptr)) {
        return;
      }
    }
  }
}

}  // namespace qlora_native::cpu
