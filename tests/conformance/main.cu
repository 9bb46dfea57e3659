// Prints what a GPU makes of the primitives, to be compared with tests/golden/cuda_primitives.txt:
//
//   nvcc -std=c++20 -arch=native --fmad=false --expt-relaxed-constexpr -Icpp -I. -Itests tests/conformance/main.cu
#include <cstdio>
#include <exception>

#include "conformance/run.h"

int main() {
  try {
    int major = 0;
    int minor = 0;
    conformance::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "no device");
    conformance::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "no device");
    std::fputs(conformance::text_of(conformance::run_all(10 * major + minor)).c_str(), stdout);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
