// The primitives in the emulator give the words that tests/golden/cuda_primitives.txt holds for every device.
#include <cstdio>
#include <fstream>
#include <sstream>

#include "conformance/run.h"
#include "cuda_on_cpu/harness.h"

namespace {

std::string golden() {
  const std::string here = __FILE__;
  std::ifstream file(here.substr(0, here.rfind('/')) + "/../golden/cuda_primitives.txt");
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace

TEST(conformance_of_the_primitives) {
  cuemu::over_all_schedules([](const char* schedule) {
    const std::string text = conformance::text_of(conformance::run_all(80));
    const std::string expected = golden();
    if (expected.empty()) {
      std::fputs(text.c_str(), stdout);  // for a golden file that is to be written
    }
    CHECK(text == expected, "under the schedule '%s' the words differ from tests/golden/cuda_primitives.txt", schedule);
  });
}
