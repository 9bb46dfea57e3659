// The tests whose names hold one of the words given, or all: test_<op>_<build> [word...]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>

#include "cpp/check.h"
#include "cuda_on_cpu/report.h"

int main(int count, char** words) {
  try {
    int run = 0;
    for (const check::Test& test : check::tests()) {
      const auto holds = [&test](const char* word) { return std::strstr(test.name, word) != nullptr; };
      if (count > 1 && std::none_of(words + 1, words + count, holds)) {
        continue;
      }
      const int before = check::failures;
      test.run();
      const std::string reports = cuemu::take_reports();
      CHECK(reports.empty(), "the emulator's reports that no test asked for:\n%s", reports.c_str());
      std::printf("%-50s %s\n", test.name, check::failures == before ? "ok" : "FAILED");
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
  std::printf("%d checks failed\n", check::failures);
  return check::failures == 0 ? 0 : 1;
}
