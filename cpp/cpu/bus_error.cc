#include "cpu/bus_error.h"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>

namespace qlora_native::cpu {

namespace {

constexpr int kUserError = 2;  // the exit code of what the user can mend

std::array<std::atomic<const BusErrorSentence*>, 256> sentences;
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

void on_bus_error(int, siginfo_t* info, void*) {
  for (const auto& place : sentences) {
    const BusErrorSentence* const listed = place;
    if (listed != nullptr && info->si_addr >= listed->begin && info->si_addr < listed->end) {
      write_once(listed->sentence);
      if (listed->ends_process) {
        _exit(kUserError);
      }
      break;
    }
  }
  sigaction(SIGBUS, &handler_before, nullptr);  // which the same fault meets next
  if (info->si_code <= 0) {                     // sent by a process: it does not come again
    raise(SIGBUS);
  }
}

}  // namespace

void list(const BusErrorSentence& sentence) {
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGBUS, &action, &handler_before) == 0;
  }();
  for (auto& place : sentences) {
    const BusErrorSentence* none = nullptr;
    if (!installed || place.compare_exchange_strong(none, &sentence)) {
      return;
    }
  }
}

void unlist(const BusErrorSentence& sentence) {
  for (auto& place : sentences) {
    const BusErrorSentence* listed = &sentence;
    place.compare_exchange_strong(listed, nullptr);
  }
}

}  // namespace qlora_native::cpu
