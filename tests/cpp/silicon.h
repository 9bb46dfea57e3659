// The bits that CPUs with AVX-512 gave: a digest of all that a test's kernels computed, against the recorded one. On
// other instruction sets nothing is compared. An emulation (tests/avx512_on_avx2) must give the same.
#pragma once

#include <cstddef>
#include <vector>

namespace silicon {

void add(const void* values, size_t bytes);

template <typename T>
void add(const std::vector<T>& values) {
  add(values.data(), values.size() * sizeof(T));
}

// Behind each test: compares what it added, if anything.
void settle(const char* test);

}  // namespace silicon
