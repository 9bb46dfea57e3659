// How the emulator fares with a kernel that has a defect: every schedule is tried, each in a process of its own,
// because AddressSanitizer ends the process that it finds something in.
#pragma once

#include <functional>
#include <string>

#include "cuda_on_cpu/harness.h"

namespace cuemu {

enum class Seen {
  kNever,      // by this build; the table names the one that finds it
  kAsWrong,    // in some schedule the result is wrong, or there is a report
  kSometimes,  // in some schedule there is a report, and not all give the right result in silence
  kAlways,     // every schedule gives a report
};

struct Tried {
  int runs = 0;
  int reported = 0;
  int wrong = 0;  // of the runs without a report
  std::string first_report;
};

// `run` launches the kernel and returns whether its result was right.
Tried try_kernel(const std::function<bool()>& run);

// One row of a table of defects: what each build must see, and words that its report must hold (empty: any).
struct Defect {
  const char* name;
  bool (*run)();
  Seen plain, race, asan;
  const char* words;
};

// `build`: CUEMU_BUILD of the file that holds the kernel.
void check_defect(const Defect& defect, const char* build);

// A kernel without one: right and silent in every schedule.
void check_sound(const char* name, bool (*run)());

}  // namespace cuemu
