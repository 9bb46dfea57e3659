// The tests whose names hold one of the words given, or all: qlora_native_cpp_tests [word...]
#include "isa_of_run.h"
#include "run_tests.h"

int main(int count, char** words) {
  return check::run_tests(count, words, isa_of_run, [] {});
}
