// Where in the kernel's source something happened, and what kind of access it was.
#pragma once

#include <cstdint>

namespace cuemu {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

struct Site {
  const char* file;
  int line;

  // As a default argument it names the caller's line.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// One word for the shadow of a byte: a site, or the address of an instruction that a compiler's hook reported.
class Where {
 public:
  constexpr Where() = default;
  static Where site(Site at) {
    return Where(reinterpret_cast<uintptr_t>(at.file) << 16 | (static_cast<uint32_t>(at.line) & 0xffffu));
  }
  static Where instruction(const void* address) { return Where(reinterpret_cast<uintptr_t>(address) << 16 | 0xffffu); }

  bool is_instruction() const { return (word_ & 0xffffu) == 0xffffu; }
  uintptr_t address() const { return static_cast<uintptr_t>(word_ >> 16); }
  int line() const { return static_cast<int>(word_ & 0xffffu); }
  uint64_t word() const { return word_; }

 private:
  explicit constexpr Where(uint64_t word) : word_(word) {}

  uint64_t word_ = 0;
};

}  // namespace cuemu
