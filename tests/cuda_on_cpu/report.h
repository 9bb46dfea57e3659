// What the emulator finds wrong. The first finding ends the launch, which then returns an error.
#pragma once

#include <string>

#include "cuda_on_cpu/site.h"

namespace cuemu {

// Called from a kernel's thread: writes the report, ends the launch and does not come back.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Where where, const char* format, ...);

// The same for an access of an address that the kernel may not use, or not so: the launch gives the error that CUDA
// does.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail_illegal(Where where, const char* format, ...);
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail_misaligned(Where where, const char* format, ...);

// Called from the host, between launches or by the scheduler: only writes the report.
void add_report(std::string text);

// The reports since the last call, one a line, the oldest first; empty if nothing was found.
std::string take_reports();

// Whether reports go to stderr too as they are written (as at the start) or are only kept.
void print_reports(bool print);

// "file.cuh:12", or for an instruction what addr2line prints of it.
std::string words(Where where);
inline std::string words(Site site) { return words(Where::site(site)); }

}  // namespace cuemu
