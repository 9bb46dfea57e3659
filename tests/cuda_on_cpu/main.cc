// The tests whose names hold one of the words given, or all: test_<op>_<build> [word...]
#include "cpp/run_tests.h"
#include "cuda_on_cpu/report.h"

int main(int count, char** words) {
  const auto settle = [](const char*) {
    const std::string reports = cuemu::take_reports();
    CHECK(reports.empty(), "the emulator's reports that no test asked for:\n%s", reports.c_str());
  };
  return check::run_tests(count, words, [] { return true; }, settle);
}
