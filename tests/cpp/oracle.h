// The truth that the kernels are held against: the arithmetic rule in double precision, one element at a time.
//
// A product of two floats is exact in double, and a sum or quotient of two floats rounded to double and then to float
// is the correctly rounded one (53 >= 2 * 24 + 2), so every step here rounds once. Nothing here but the making of
// inputs depends on the flags that flush subnormal floats, or on the conversions of core/half.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/codebook.h"
#include "core/gguf.h"
#include "core/half.h"
#include "core/layout.h"
#include "core/nested_code.h"
#include "core/weight_view.h"

namespace oracle {

using namespace qlora_native;

// A binary interchange format: sign, exponent, mantissa.
struct Format {
  int exponent_bits;
  int mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};

inline double value_of(Format format, uint32_t bits) {
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1);
  const uint32_t exponent = bits >> format.mantissa_bits & ((1u << format.exponent_bits) - 1);
  const bool negative = (bits >> (format.mantissa_bits + format.exponent_bits) & 1) != 0;
  double magnitude = std::numeric_limits<double>::infinity();
  if (exponent == 0) {
    magnitude = std::ldexp(mantissa, 1 - format.bias() - format.mantissa_bits);
  } else if (exponent != (1u << format.exponent_bits) - 1) {
    magnitude = std::ldexp(mantissa + (1u << format.mantissa_bits),
                           static_cast<int>(exponent) - format.bias() - format.mantissa_bits);
  } else if (mantissa != 0) {
    magnitude = std::numeric_limits<double>::quiet_NaN();
  }
  return negative ? -magnitude : magnitude;
}

// To nearest, ties to even, with gradual underflow; infinity from half a step past the largest finite value.
inline double rounded(Format format, double x) {
  if (x == 0.0 || !std::isfinite(x)) {
    return x;
  }
  int exponent = 0;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - 1, 1 - format.bias()) - format.mantissa_bits);
  const double result = std::nearbyint(x / step) * step;
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -format.mantissa_bits), format.bias());
  return std::fabs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : result;
}

// The same number, zeros distinguished by their sign.
inline bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// What a storage type is called and how its bits are read.
template <typename T>
struct Storage;
template <>
struct Storage<float> {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static constexpr Format kFormat{8, 23};
};
template <>
struct Storage<Bf16> {
  static constexpr Dtype kDtype = Dtype::kBfloat16;
  static constexpr Format kFormat{8, 7};
};
template <>
struct Storage<Fp16> {
  static constexpr Dtype kDtype = Dtype::kFloat16;
  static constexpr Format kFormat{5, 10};
};

inline constexpr Format kFloat = Storage<float>::kFormat;

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline uint32_t bits_of(Bf16 x) { return x.bits; }
inline uint32_t bits_of(Fp16 x) { return x.bits; }

template <typename T>
double value_of(T x) {
  return value_of(Storage<T>::kFormat, bits_of(x));
}

template <typename T>
T from_bits(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(bits);
  } else {
    return T{static_cast<uint16_t>(bits)};
  }
}

template <typename T>
std::vector<double> doubles_of(const std::vector<T>& values) {
  std::vector<double> made;
  for (const T value : values) {
    made.push_back(value_of(value));
  }
  return made;
}

// ---------------------------------------------------------------------------------------------------------------------
// Codes

// The level nearest to x, the lower index on a tie.
inline int nearest(const float* levels, int count, double x) {
  int best = 0;
  for (int i = 1; i < count; ++i) {
    if (std::fabs(x - value_of(levels[i])) < std::fabs(x - value_of(levels[best]))) {
      best = i;
    }
  }
  return best;
}

// Midpoint of two neighboring entries as fp32 holds it: the point that counts as a tie.
inline double midpoint(const float* table, int i) {
  return rounded(kFloat, (value_of(table[i]) + value_of(table[i + 1])) / 2.0);
}

// Which midpoint of the table x is, or -1.
inline int tie(const std::vector<double>& midpoints, double x) {
  const auto found = std::find(midpoints.begin(), midpoints.end(), x);
  return found == midpoints.end() ? -1 : static_cast<int>(found - midpoints.begin());
}

inline std::vector<double> midpoints_of(const float* table, int count) {
  std::vector<double> midpoints;
  for (int i = 0; i + 1 < count; ++i) {
    midpoints.push_back(midpoint(table, i));
  }
  return midpoints;
}

inline int nf4_code(double x) {
  static constexpr Levels levels = nf4_levels();
  static const std::vector<double> midpoints = midpoints_of(levels.value, 16);
  const int lower = tie(midpoints, x);
  return lower >= 0 ? lower : nearest(levels.value, 16, x);
}

// The positive FP4 codes in rising order of what they decode to.
inline std::vector<int> fp4_codes_by_magnitude() {
  static constexpr Levels levels = fp4_levels();
  std::vector<int> order;
  while (order.size() < 8) {
    int next = -1;
    for (int code = 0; code < 8; ++code) {
      const bool above = order.empty() || levels.value[code] > levels.value[order.back()];
      if (above && (next < 0 || levels.value[code] < levels.value[next])) {
        next = code;
      }
    }
    order.push_back(next);
  }
  return order;
}

inline int fp4_code(double x) {
  static const std::vector<int> order = fp4_codes_by_magnitude();
  static constexpr Fp4Pivots pivots = fp4_pivots();
  size_t rank = 0;
  while (rank < 7 && value_of(pivots.value[rank]) < std::fabs(x)) {
    ++rank;
  }
  return order[rank] + (x < 0.0 ? 8 : 0);
}

inline int code_of(QuantType type, double x) { return type == QuantType::kNf4 ? nf4_code(x) : fp4_code(x); }

inline int nested_code(double x) {
  static const std::vector<double> midpoints = midpoints_of(kNestedCode.value, 256);
  const int lower = tie(midpoints, x);
  return lower >= 0 ? lower + lower % 2 : nearest(kNestedCode.value, 256, x);
}

// ---------------------------------------------------------------------------------------------------------------------
// The arithmetic rule

// x brought into [-1, 1]; absmax is a positive float.
inline double normalized(double x, double absmax) {
  const double reciprocal = rounded(kFloat, 1.0 / absmax);
  return rounded(kFloat, std::isinf(reciprocal) ? x / absmax : x * reciprocal);
}

inline double scale_of(const WeightView& weight, int64_t block) {
  if (weight.absmax != nullptr) {
    return value_of(weight.absmax[block]);
  }
  const double product = rounded(
      kFloat, value_of(weight.nested_code[weight.absmax_codes[block]]) * value_of(weight.nested_absmax[block / 256]));
  return rounded(kFloat, product + value_of(*weight.nested_offset));
}

// An element of whole blocks of a GGUF type, from its code and its scale.
inline double gguf_element(const WeightView& weight, int64_t element) {
  return with_gguf(weight.type, [&]<QuantType kType>() {
    constexpr BlockFormat kFormat = kBlockFormats[static_cast<int>(kType)];
    const uint8_t* block = weight.packed + element / kFormat.elements * kFormat.bytes;
    const int at = static_cast<int>(element % kFormat.elements);
    const GgufScale scale = Gguf<kType>::scale(block, at);
    const double product = rounded(kFloat, Gguf<kType>::code(block, at) * value_of(scale.factor));
    return Gguf<kType>::kAdds ? rounded(kFloat, product + value_of(scale.addend)) : product;
  });
}

inline double dequantized(const WeightView& weight, int64_t element, Format format) {
  if (is_gguf(weight.type)) {
    return rounded(format, gguf_element(weight, element));
  }
  const int byte = weight.packed[element >> 1];
  const int code = (element & 1) == 0 ? byte / 16 : byte % 16;
  const double scale = scale_of(weight, element / weight.block_size);
  return rounded(format, rounded(kFloat, value_of(weight.levels[code]) * scale));
}

// ---------------------------------------------------------------------------------------------------------------------
// Inputs

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint32_t bits() { return static_cast<uint32_t>(engine_() >> 32); }
  uint8_t byte() { return static_cast<uint8_t>(engine_() >> 56); }
  float uniform() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }  // in [-1, 1]
  // Any finite float, every exponent alike.
  float any_finite() {
    const uint32_t word = bits();
    return std::bit_cast<float>((word >> 23 & 255) == 255 ? word ^ 0x40000000u : word);
  }

 private:
  std::mt19937_64 engine_;
};

// In [-largest, largest], rounded to T.
template <typename T>
std::vector<T> uniform_values(Random& random, int64_t count, float largest = 1.0f) {
  std::vector<T> made;
  for (int64_t i = 0; i < count; ++i) {
    made.push_back(from_float<T>(largest * random.uniform()));
  }
  return made;
}

template <typename T>
double value_at(const std::vector<T>& values, int64_t i) {
  return value_of(values[static_cast<size_t>(i)]);
}

// Where rounding to T turns: the middle of every finite T and the next one away from zero, and the floats beside it.
template <typename T>
std::vector<float> turning_points() {
  constexpr Format format = Storage<T>::kFormat;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> points;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double here = value_of(format, bits);
    if (!std::isfinite(here)) {
      continue;
    }
    const uint32_t magnitude = bits & 0x7fffu;  // patterns 2k and 2k + 1 share an exponent
    const double step = value_of(format, magnitude | 1u) - value_of(format, magnitude & ~1u);
    const auto middle = static_cast<float>(here + std::copysign(step / 2.0, here));
    points.insert(points.end(),
                  {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, std::copysign(kInfinity, middle))});
  }
  return points;
}

inline constexpr QuantType kGgufTypes[] = {QuantType::kQ4_0,  QuantType::kQ4_1, QuantType::kQ5_0, QuantType::kQ5_1,
                                           QuantType::kQ8_0,  QuantType::kQ4_K, QuantType::kQ5_K, QuantType::kQ6_K,
                                           QuantType::kIq4Nl, QuantType::kMxfp4};

inline int64_t block_of(QuantType type) { return kBlockFormats[static_cast<int>(type)].elements; }

// A quantized weight of random bytes and scales of both signs, whose buffers end where the format ends them: a
// sanitizer sees an overrun.
struct RandomWeight {
  RandomWeight(int64_t numel, int64_t block_size, bool nested, QuantType type, uint64_t seed)
      : levels(levels_of(type)),
        packed(static_cast<size_t>(packed_bytes(type, numel))),
        codes(nested ? static_cast<size_t>(num_blocks(numel, block_size)) : 0),
        scales(is_gguf(type) ? 0
                             : static_cast<size_t>(nested ? num_nested_blocks(num_blocks(numel, block_size))
                                                          : num_blocks(numel, block_size))) {
    Random random(seed);
    for (uint8_t& byte : packed) {
      byte = random.byte();
    }
    for (uint8_t& code : codes) {
      code = random.byte();
    }
    for (float& scale : scales) {
      scale = nested ? 0.01f + 0.01f * random.uniform() : 0.02f * random.uniform();
    }
    view = {packed.data(),
            nested ? nullptr : scales.data(),
            nested ? codes.data() : nullptr,
            nested ? scales.data() : nullptr,
            &offset,
            kNestedCode.value,
            levels.value,
            numel,
            block_size,
            type};
    if (is_gguf(type)) {
      set_halves(random);
    }
  }
  // The scales and minima of GGUF's blocks.
  void set_halves(Random& random) {
    const BlockFormat& format = kBlockFormats[static_cast<int>(view.type)];
    const bool adds = with_gguf(view.type, []<QuantType kType>() { return Gguf<kType>::kAdds; });
    for (size_t block = 0; block < packed.size(); block += static_cast<size_t>(format.bytes)) {
      if (view.type == QuantType::kMxfp4) {
        packed[block] = static_cast<uint8_t>(116 + random.byte() % 6);
        continue;
      }
      for (const size_t at : {size_t{0}, adds ? size_t{2} : size_t{0}}) {
        const Fp16 half = from_float<Fp16>(0.01f * random.uniform());
        std::memcpy(packed.data() + block + (view.type == QuantType::kQ6_K ? 208 : at), &half, sizeof half);
      }
    }
  }
  RandomWeight(const RandomWeight&) = delete;
  RandomWeight& operator=(const RandomWeight&) = delete;

  Levels levels;
  std::vector<uint8_t> packed;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  float offset = -0.0005f;  // scales of both signs have about this mean
  WeightView view;
};

// An allocation of the exact size at an address that a tile may be loaded from, filled with NaN: what is not written
// must not be read.
struct Scratch {
  std::vector<unsigned char> bytes;
  unsigned char* aligned;
  explicit Scratch(int64_t count) : bytes(static_cast<size_t>(count) + 64, 0xff) {
    aligned = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
};

}  // namespace oracle
