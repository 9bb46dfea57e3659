// The operations of vec.h without vector instructions. One lane: the rule itself.
#pragma once

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {

struct Floats {
  float value;
};
inline constexpr int kLanes = 1;

template <typename T>
inline Floats load(const T* p) {
  return {to_float(*p)};
}
template <int kFirst>
inline Floats widened(Bytes16 codes) {
  return {static_cast<float>(static_cast<int8_t>(codes[kFirst]))};
}
inline Bytes16 look_up_16(const int8_t* table, Bytes16 codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = static_cast<uint8_t>(table[codes[i]]);
  }
  return codes;
}
inline void store(float* p, Floats v) { *p = v.value; }
inline Floats zero() { return {0.0f}; }
inline Floats all(float x) { return {x}; }
inline Floats add(Floats a, Floats b) { return {a.value + b.value}; }
inline Floats multiply(Floats a, Floats b) { return {a.value * b.value}; }
inline Floats divide(Floats a, Floats b) { return {a.value / b.value}; }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return {a.value * b.value + sum.value}; }
inline float total(Floats v) { return v.value; }
inline float total_by_halves(Floats v) { return v.value; }

template <typename T>
class Decoder {
 public:
  static constexpr int kBytes = 1;
  Decoder(const float* levels, float scale) {
    for (int i = 0; i < 16; ++i) {
      table_[i] = from_float<T>(levels[i] * scale);
    }
  }
  template <bool kStream = false>
  void step(const uint8_t* bytes, T* out) const {
    out[0] = table_[*bytes >> 4];
    out[1] = table_[*bytes & 15];
  }

 private:
  T table_[16];
};

// ---------------------------------------------------------------------------------------------------------------------
// Panels

using Words = uint32_t;
inline void transpose(Floats (&)[kLanes]) {}
inline constexpr int kMicroRows = 4;
inline constexpr int kTileVectors = 4;

template <unsigned kBits>
inline Words shift_right(Words v) {
  return v >> kBits;
}
template <typename T>
inline Floats round_through(Floats v) {
  return {to_float(from_float<T>(v.value))};
}
inline Floats pair_up(Floats even, Floats odd) {
  return {std::bit_cast<float>(std::bit_cast<uint32_t>(even.value) >> 16 | std::bit_cast<uint32_t>(odd.value))};
}

struct LevelTable {
  float level[16];
  explicit LevelTable(const float* levels) { std::memcpy(level, levels, sizeof level); }
  template <typename T>
  LevelTable scaled(float scale) const {
    LevelTable result = *this;
    for (float& value : result.level) {
      value = round_through<T>({value * scale}).value;
    }
    return result;
  }
  Floats at(Words codes) const { return {level[codes & 15]}; }
};

inline Words natural_codes(const uint8_t* packed, int64_t element) {
  return element % 2 == 0 ? packed[element / 2] >> 4 : packed[element / 2];
}
inline void transpose_codes(const uint8_t* const* rows, int64_t offset, Words* out) {
  std::memcpy(out, rows[0] + offset, 16);
}

template <typename T>
inline void store_as(T* p, Floats v) {
  *p = from_float<T>(v.value);
}

template <typename T>
class StreamLevels {
 public:
  explicit StreamLevels(const float* levels) : table_(levels) {}
  template <typename Use>
  void decode(const uint8_t* bytes, const Use& use) const {
    for (int i = 0; i < 64; i += 2) {
      const Words pair = bytes[i / 2];
      use(i, table_.at(shift_right<4>(pair)));
      use(i + 1, table_.at(pair));
    }
  }
  static constexpr int element_of(int slot) { return slot; }

 private:
  LevelTable table_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Sixteen lanes

struct Sixteen {
  float v[16];
};
struct SixteenInts {
  int32_t v[16];
};

template <typename Out, typename Each>
inline Out sixteen_of(const Each& each) {
  Out out;
  for (int i = 0; i < 16; ++i) {
    out.v[i] = each(i);
  }
  return out;
}

inline Sixteen splat(float x) {
  return sixteen_of<Sixteen>([=](int) { return x; });
}
inline Sixteen operator+(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Sixteen operator-(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Sixteen operator*(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Sixteen operator/(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] / b.v[i]; });
}
inline Sixteen fused(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
  return sixteen_of<Sixteen>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Sixteen larger(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Sixteen smaller(const Sixteen& a, const Sixteen& b) {
  return sixteen_of<Sixteen>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline SixteenInts bits_of(const Sixteen& a) {
  return sixteen_of<SixteenInts>([&](int i) { return std::bit_cast<int32_t>(a.v[i]); });
}
// Through unsigned numbers, which wrap as registers do.
inline int32_t wrapped(uint32_t x) { return static_cast<int32_t>(x); }
inline SixteenInts operator+(const SixteenInts& a, int32_t b) {
  return sixteen_of<SixteenInts>(
      [&](int i) { return wrapped(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b)); });
}
inline SixteenInts operator-(const SixteenInts& a, const SixteenInts& b) {
  return sixteen_of<SixteenInts>(
      [&](int i) { return wrapped(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])); });
}
inline SixteenInts half_of(const SixteenInts& a) {
  return sixteen_of<SixteenInts>([&](int i) { return a.v[i] >> 1; });
}
inline Sixteen power_of_two(const SixteenInts& a) {
  return sixteen_of<Sixteen>([&](int i) { return std::bit_cast<float>((static_cast<uint32_t>(a.v[i]) + 127u) << 23); });
}

template <typename T>
inline Sixteen load16(const T* p) {
  return sixteen_of<Sixteen>([=](int i) { return to_float(p[i]); });
}
template <typename T>
inline void store16(T* p, const Sixteen& a) {
  for (int i = 0; i < 16; ++i) {
    p[i] = from_float<T>(a.v[i]);
  }
}

// Lanes i and i + 8, then i + 4, i + 2, i + 1: the order of all instruction sets.
template <typename Fold>
inline float folded(const Sixteen& a, const Fold& fold) {
  Sixteen lane = a;
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) {
      lane.v[i] = fold(lane.v[i], lane.v[i + step]);
    }
  }
  return lane.v[0];
}
inline float sum16(const Sixteen& a) {
  return folded(a, [](float x, float y) { return x + y; });
}
inline float max16(const Sixteen& a) {
  return folded(a, [](float x, float y) { return x > y ? x : y; });
}

inline constexpr int kSixteenRows = 2;
inline constexpr int kSixteenColumns = 1;
inline Sixteen multiply_add(const Sixteen& a, const Sixteen& b, const Sixteen& sum) {
  return sum + a * b;  // fused() would be a function call
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizers

struct MagnitudeMax {
  uint32_t bits = 0;
  void update(Floats v) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(v.value) & 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  uint32_t reduce() const { return bits; }
};

inline Floats subtract(Floats a, Floats b) { return {a.value - b.value}; }
inline Floats square_root(Floats a) { return {__builtin_sqrtf(a.value)}; }
inline Floats signed_rate(Floats lr, Floats x) {
  return {x.value > 0.0f ? lr.value : x.value < 0.0f ? -lr.value : 0.0f};
}

class StateDecoder {
 public:
  explicit StateDecoder(const StateCode&) {}
  Floats operator()(const int8_t* codes) const { return {decode_state(kSignedState, *codes)}; }
  Floats operator()(const uint8_t* codes) const { return {decode_state(kUnsignedState, *codes)}; }
};

using Ints = int;

template <typename Code>
inline void store_bytes(Code* p, Ints a, Ints b, Ints c, Ints d) {
  p[0] = static_cast<Code>(a);
  p[1] = static_cast<Code>(b);
  p[2] = static_cast<Code>(c);
  p[3] = static_cast<Code>(d);
}

class StateEncoder {
 public:
  explicit StateEncoder(const StateCode&) {}
  Ints of_signed(Floats x) const { return encode_signed(kSignedState, x.value); }
  Ints of_unsigned(Floats x) const { return encode_unsigned(kUnsignedState, x.value); }
};

class SquareSums {
 public:
  void update(const float* x) {
    for (int i = 0; i < kNormLanes; ++i) {
      const double v = static_cast<double>(x[i]);
      sums_[i] += v * v;
    }
  }
  void store(double* p) const { std::memcpy(p, sums_, sizeof sums_); }

 private:
  double sums_[kNormLanes] = {};
};

}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
