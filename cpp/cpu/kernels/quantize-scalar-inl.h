// Quantizing without vector instructions: the rule itself.
#pragma once

#include "cpu/isa/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

template <typename T>
inline T largest_magnitude(const T* x, int64_t count) {
  MagnitudeMax highest;
  for (int64_t i = 0; i < count; ++i) {
    highest.update(load(x + i));
  }
  return from_float<T>(std::bit_cast<float>(highest.reduce()));
}

template <QuantType kType>
inline uint8_t nearest_code(float v) {
  return kType == QuantType::kNf4 ? nf4_code(v) : fp4_code(v);
}

template <typename T, QuantType kType>
void encode(const T* x, int64_t count, const float* factor, int log2_block, uint8_t* packed) {
  for (int64_t i = 0; i < count; i += 2) {
    const auto code = [&](T value) { return nearest_code<kType>(to_float(value) * factor[i >> log2_block]); };
    packed[i / 2] = pack_nibbles(code(x[i]), code(x[i + 1]));
  }
}

template <QuantType kType>
class Nearest {
 public:
  void levels(const Floats* v, Floats* out) const {
    for (int i = 0; i < kParts; ++i) {
      out[i] = {kLevels.value[nearest_code<kType>(v[i].value)]};
    }
  }
  void codes(const Floats* v, uint8_t* out) const {
    for (int i = 0; i < kParts; ++i) {
      out[i] = nearest_code<kType>(v[i].value);
    }
  }

 private:
  static constexpr Levels kLevels = levels_of(kType);
};

// Codes of kLanes scales: nearest_nested_code() of the normalized difference from the offset.
inline void nested_codes(const float* scales, float offset, const Normalizer& by, uint8_t* codes) {
  *codes = nearest_nested_code(by(*scales - offset));
}

inline Floats nested_levels(const float* table, const uint8_t* codes) { return {table[*codes]}; }

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
