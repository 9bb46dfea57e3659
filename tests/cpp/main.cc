// The tests whose names hold one of the words given, or all: qlora_native_cpp_tests [word...]
#include "isa_of_run.h"
#include "run_tests.h"
#include "silicon.h"

#if defined(__SANITIZE_THREAD__)
// A mapping that takes the place of another with the same bytes may be read meanwhile; to ThreadSanitizer, mmap writes.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions() { return "race_top:mmap"; }
#endif

int main(int count, char** words) { return check::run_tests(count, words, isa_of_run, silicon::settle); }
