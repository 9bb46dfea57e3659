// The code of a normalized value against a search through all levels in double precision.
#include <algorithm>

#include "check.h"
#include "core/arithmetic.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

// Each point of a table and the floats beside it, both signs; then random values.
template <typename Check>
void sweep(const std::vector<float>& points, const Check& check) {
  for (const float point : points) {
    for (const float x : {point, std::nextafter(point, -2.0f), std::nextafter(point, 2.0f)}) {
      check(x);
      check(-x);
    }
  }
  oracle::Random random(11);
  for (int i = 0; i < 100000; ++i) {
    check(random.uniform());
    check(std::ldexp(random.uniform(), -static_cast<int>(random.byte() % 30)));
  }
  for (const float x : {0.0f, -0.0f, 0x1p-149f, -0x1p-149f, 1.0000001f, -1.0000001f}) {
    check(x);
  }
}

std::vector<float> with_midpoints(const float* table, int count) {
  std::vector<float> points(table, table + count);
  for (int i = 0; i + 1 < count; ++i) {
    points.push_back(static_cast<float>(oracle::midpoint(table, i)));
  }
  return points;
}

TEST(nf4_code_is_the_nearest) {
  constexpr Levels levels = nf4_levels();
  sweep(with_midpoints(levels.value, 16), [](float x) {
    CHECK(nf4_code(x) == oracle::nf4_code(static_cast<double>(x)), "%a gave %d", static_cast<double>(x), nf4_code(x));
  });
}

TEST(nf4_tie_takes_the_lower_code) {
  constexpr Levels levels = nf4_levels();
  for (int i = 0; i < 15; ++i) {
    const float middle = static_cast<float>(oracle::midpoint(levels.value, i));
    CHECK(nf4_code(middle) == i, "boundary %d gave %d", i, nf4_code(middle));
    CHECK(nf4_code(std::nextafter(middle, 2.0f)) == i + 1, "just above boundary %d", i);
  }
}

TEST(fp4_code_follows_the_pivots) {
  constexpr Fp4Pivots pivots = fp4_pivots();
  sweep({pivots.value, pivots.value + 7}, [](float x) {
    CHECK(fp4_code(x) == oracle::fp4_code(static_cast<double>(x)), "%a gave %d", static_cast<double>(x), fp4_code(x));
  });
}

TEST(fp4_code_is_the_nearest_off_the_pivots) {
  constexpr Levels levels = fp4_levels();
  constexpr Fp4Pivots pivots = fp4_pivots();
  const std::vector<int> order = oracle::fp4_codes_by_magnitude();
  std::vector<float> magnitudes;
  for (const int code : order) {
    magnitudes.push_back(levels.value[code]);
  }
  sweep(magnitudes, [&](float x) {
    const double magnitude = std::fabs(static_cast<double>(x));
    // The pivots are decimal roundings of the midpoints, so within a millionth of them either side is right.
    const bool near = std::any_of(pivots.value, pivots.value + 7, [magnitude](float pivot) {
      return std::fabs(magnitude - static_cast<double>(pivot)) < 1e-6;
    });
    const int expected = order[static_cast<size_t>(oracle::nearest(magnitudes.data(), 8, magnitude))] | (x < 0.0f) * 8;
    CHECK(near || fp4_code(x) == expected, "%a gave %d, expected %d", static_cast<double>(x), fp4_code(x), expected);
  });
}

TEST(fp4_pivot_takes_the_smaller_magnitude) {
  constexpr Fp4Pivots pivots = fp4_pivots();
  const std::vector<int> order = oracle::fp4_codes_by_magnitude();
  for (size_t i = 0; i < 7; ++i) {
    CHECK(fp4_code(pivots.value[i]) == order[i], "pivot %zu", i);
    CHECK(fp4_code(-pivots.value[i]) == order[i] + 8, "pivot %zu, negative", i);
    CHECK(fp4_code(std::nextafter(pivots.value[i], 2.0f)) == order[i + 1], "just above pivot %zu", i);
  }
}

TEST(nested_code_is_the_nearest) {
  sweep(with_midpoints(kNestedCode.value, 256), [](float x) {
    const int expected = oracle::nested_code(static_cast<double>(x));
    CHECK(nearest_nested_code(x) == expected, "%a gave %d, expected %d", static_cast<double>(x), nearest_nested_code(x),
          expected);
  });
}

TEST(nested_tie_takes_the_even_code) {
  for (int i = 0; i < 255; ++i) {
    const float middle = static_cast<float>(oracle::midpoint(kNestedCode.value, i));
    CHECK(nearest_nested_code(middle) == i + i % 2, "tie %d gave %d", i, nearest_nested_code(middle));
    CHECK(nearest_nested_code(std::nextafter(middle, -2.0f)) == i, "just below tie %d", i);
    CHECK(nearest_nested_code(std::nextafter(middle, 2.0f)) == i + 1, "just above tie %d", i);
  }
}

TEST(tables_are_sorted_and_symmetric_where_they_must_be) {
  constexpr Levels nf4 = nf4_levels();
  CHECK(std::is_sorted(nf4.value, nf4.value + 16) && nf4.value[0] == -1.0f && nf4.value[15] == 1.0f, "nf4");
  CHECK(nf4.value[zero_code(QuantType::kNf4)] == 0.0f && !std::signbit(nf4.value[7]), "nf4 zero");
  constexpr Levels fp4 = fp4_levels();
  CHECK(fp4.value[zero_code(QuantType::kFp4)] == 0.0f && !std::signbit(fp4.value[8]), "fp4 code 8 is +0");
  for (int code = 1; code < 8; ++code) {
    CHECK(fp4.value[code + 8] == -fp4.value[code], "fp4 code %d", code);
  }
  CHECK(std::is_sorted(kNestedCode.value, kNestedCode.value + 256), "nested code");
  CHECK(kNestedCode.value[kNestedZero] == 0.0f && kNestedCode.value[255] == 1.0f, "nested zero and one");
}

}  // namespace
