// All the framework these tests need: TEST registers a function, CHECK counts and prints a failure and goes on.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int failures = 0;

__attribute__((format(printf, 4, 5))) inline void fail(const char* file, int line, const char* condition,
                                                       const char* detail, ...) {
  constexpr int kMostPrinted = 20;  // a broken kernel fails for every element
  if (++failures > kMostPrinted) {
    return;
  }
  std::va_list arguments;
  va_start(arguments, detail);
  std::printf("%s:%d: %s: ", file, line, condition);
  std::vprintf(detail, arguments);
  std::printf("\n");
  va_end(arguments);
}

}  // namespace check

#define CHECK(condition, ...) ((condition) ? void() : check::fail(__FILE__, __LINE__, #condition, __VA_ARGS__))

#define TEST(name)                                                                       \
  static void name();                                                                    \
  static const bool name##_registered = (check::tests().push_back({#name, name}), true); \
  static void name()
