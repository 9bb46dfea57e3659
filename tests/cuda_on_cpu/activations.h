// What the tests of norms, gates and rotations share: results compared bit for bit.
#pragma once

#include <vector>

#include "cpp/oracle.h"
#include "cuda_on_cpu/harness.h"
#include "cuda_on_cpu/launch.h"

namespace cuemu {

template <typename T>
inline constexpr qlora_native::Dtype kDtype = oracle::Storage<T>::kDtype;

// NaN equals NaN whatever its bits.
template <typename T>
void check_same_bits(const char* what, const std::vector<T>& got, const std::vector<T>& expected) {
  CHECK(got.size() == expected.size(), "%s: %zu values, expected %zu", what, got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    CHECK(oracle::same(oracle::value_of(got[i]), oracle::value_of(expected[i])), "%s[%zu] is %a, expected %a", what, i,
          oracle::value_of(got[i]), oracle::value_of(expected[i]));
  }
}

}  // namespace cuemu
