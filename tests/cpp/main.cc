#include <cstdio>
#include <exception>

#include "check.h"
#include "isa_of_run.h"

int main() {
  try {
    if (!isa_of_run()) {
      return 77;
    }
    for (const check::Test& test : check::tests()) {
      const int before = check::failures;
      test.run();
      std::printf("%-50s %s\n", test.name, check::failures == before ? "ok" : "FAILED");
    }
  } catch (const std::exception& error) {
    std::printf("unexpected exception: %s\n", error.what());
    return 1;
  }
  std::printf("%d checks failed\n", check::failures);
  return check::failures == 0 ? 0 : 1;
}
