// The main function of a program of tests.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"

namespace check {

inline constexpr int kSkipped = 77;  // exit code: this machine or build lacks what the tests need

// The tests whose names hold one of the words given, or all, if prepare() is true; behind each one settle(its name).
// The exit code of the program.
template <typename Prepare, typename Settle>
int run_tests(int count, char** words, Prepare prepare, Settle settle) {
  try {
    if (!prepare()) {
      return kSkipped;
    }
    int run = 0;
    for (const Test& test : tests()) {
      const auto holds = [&test](const char* word) { return std::strstr(test.name, word) != nullptr; };
      if (count > 1 && std::none_of(words + 1, words + count, holds)) {
        continue;
      }
      const int before = failures;
      const auto began = std::chrono::steady_clock::now();
      test.run();
      settle(test.name);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
      std::printf("%-50s %7.2f s  %s\n", test.name, seconds.count(), failures == before ? "ok" : "FAILED");
      std::fflush(stdout);
      ++run;
    }
    if (run == 0) {
      std::printf("no test has such a name\n");
      return 1;
    }
  } catch (const std::exception& error) {
    std::printf("unexpected exception: %s\n", error.what());
    return 1;
  }
  std::printf("%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace check
