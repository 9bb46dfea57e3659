#include "cuda_on_cpu/report.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/builtins.h"

namespace cuemu {
namespace {

std::string kept;
bool printed = true;

[[noreturn]] void fail_with(const std::string& where, const char* format, std::va_list arguments) {
  in_check = true;
  char text[1024];
  std::vsnprintf(text, sizeof(text), format, arguments);
  std::string whole = where + ": " + text;
  if (self != nullptr) {
    char thread[120];
    std::snprintf(thread, sizeof(thread), " [block (%u, %u, %u), thread %d]", ::blockIdx.x, ::blockIdx.y, ::blockIdx.z,
                  self->linear);
    whole += thread;
  }
  add_report(std::move(whole));
  block.failed = true;
  Fiber::leave();
}

std::string words_of_instruction(uintptr_t address) {
  Dl_info found{};
  if (dladdr(reinterpret_cast<void*>(address), &found) == 0 || found.dli_fname == nullptr) {
    return "an unknown instruction";
  }
  char text[512];
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(found.dli_fbase) - 1;  // within the call
  std::snprintf(text, sizeof(text), "addr2line -e '%s' %#zx 2>/dev/null", found.dli_fname, static_cast<size_t>(offset));
  std::string line;
  if (std::FILE* pipe = popen(text, "r"); pipe != nullptr) {
    if (std::fgets(text, sizeof(text), pipe) != nullptr) {
      line = text;
    }
    pclose(pipe);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  if (line.empty() || line.starts_with("?")) {
    std::snprintf(text, sizeof(text), "%s+%#zx", found.dli_fname, static_cast<size_t>(offset));
    return text;
  }
  return line;
}

}  // namespace

void fail(Site site, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  fail_with(words(site), format, arguments);
}

void fail(Where where, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  fail_with(words(where), format, arguments);
}

void fail_illegal(Where where, const char* format, ...) {
  block.failure = cudaErrorIllegalAddress;
  std::va_list arguments;
  va_start(arguments, format);
  fail_with(words(where), format, arguments);
}

void fail_misaligned(Where where, const char* format, ...) {
  block.failure = cudaErrorMisalignedAddress;
  std::va_list arguments;
  va_start(arguments, format);
  fail_with(words(where), format, arguments);
}

void add_report(std::string text) {
  if (printed) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", text.c_str());
  }
  kept += text + "\n";
}

std::string take_reports() {
  std::string all;
  all.swap(kept);
  return all;
}

void print_reports(bool print) { printed = print; }

std::string words(Where where) {
  in_check = self != nullptr;  // and until the launch has ended
  if (where.is_instruction()) {
    return words_of_instruction(where.address());
  }
  const char* file = reinterpret_cast<const char*>(where.address());
  return file == nullptr ? "an unknown place" : std::string(file) + ":" + std::to_string(where.line());
}

}  // namespace cuemu
