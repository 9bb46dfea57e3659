// Nearest levels of 16 values at a time, whatever their range, and sums of 16 lanes in one order for every instruction
// set: what the calibrated methods decide by must not depend on it.
//
// Included by kernels/all-inl.h; the same rules hold.
#pragma once

#include "cpu/isa/vec.h"
#include "cpu/kernels/quantize-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Lane i and lane i + 8, then i and i + 4, and so on. Overwrites the sums.
inline float sum_by_halves(Floats* sums) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      sums[i] = add(sums[i], sums[i + half]);
    }
  }
  return total_by_halves(sums[0]);
}

// 1 / scale, and 0 where that is not finite: such a block takes the code of zero throughout.
inline float reciprocal_or_zero(float scale) {
  const float reciprocal = 1.0f / scale;
  return (std::bit_cast<uint32_t>(reciprocal) & kMagnitudeMask) < kInfinityBits ? reciprocal : 0.0f;
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
