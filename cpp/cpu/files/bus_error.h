// A page of a mapped file that the kernel can neither read nor find room for is a SIGBUS of whoever touches it. Its
// handler finds the file by the address and prints a sentence.
#pragma once

#include <string>

namespace qlora_native::cpu {

struct BusErrorSentence {
  std::string sentence;       // ends in a newline
  bool ends_process = false;  // by exit code 2 behind it; else the handler before ours decides
  const char* begin = nullptr;
  const char* end = nullptr;
};

// The sentence for its addresses, until it is unlisted. False if there is not the memory to list another one.
[[nodiscard]] bool list(const BusErrorSentence& sentence);
void unlist(const BusErrorSentence& sentence);

}  // namespace qlora_native::cpu
