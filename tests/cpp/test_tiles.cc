// Products by tiles against sums in double precision. On instruction sets without tiles there is nothing to run.
#include <cstring>
#include <tuple>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.h"
#include "cpu/kernels/tiles.h"
#include "cpu/parallel.h"
#include "oracle.h"

using namespace qlora_native;
using cpu::TileProduct;

namespace {

std::vector<Bf16> random_values(oracle::Random& random, int64_t count) {
  std::vector<Bf16> made;
  for (int64_t i = 0; i < count; ++i) {
    made.push_back(from_float<Bf16>(random.uniform()));
  }
  return made;
}

double at(const std::vector<Bf16>& matrix, int64_t columns, int64_t row, int64_t column) {
  return oracle::value_of(matrix[static_cast<size_t>(row * columns + column)]);
}

struct Case {
  int64_t m, n, k, r, block_size;
  bool nested, with_bias, dense;
  QuantType type = QuantType::kNf4;
};

void check_product(const Case& c, bool forward, bool project) {
  const oracle::RandomWeight weight(c.n * c.k, c.block_size, c.nested, c.type, static_cast<uint64_t>(c.n + c.k));
  oracle::Random random(static_cast<uint64_t>(c.m));
  const int64_t depth = forward ? c.k : c.n;
  const int64_t width = forward ? c.n : c.k;
  const auto dense = random_values(random, c.n * c.k);
  const auto x = random_values(random, c.m * depth);
  auto low = random_values(random, c.m * c.r);
  const auto down = random_values(random, c.r * depth);
  const auto up = random_values(random, c.r * width);
  const auto bias = random_values(random, width);
  std::vector<Bf16> y(static_cast<size_t>(c.m * width));
  TileProduct product{};
  product.forward = forward;
  product.matrix = {c.dense ? nullptr : &weight.view, c.dense ? dense.data() : nullptr, c.n, c.k};
  product.x = x.data();
  product.bias = c.with_bias && forward ? bias.data() : nullptr;
  product.low = c.r > 0 ? low.data() : nullptr;
  product.down = project ? down.data() : nullptr;
  product.made_low = low.data();
  product.down_scale = 0.75f;
  product.up = up.data();
  product.r = c.r;
  product.y = y.data();
  product.m = c.m;
  const oracle::Scratch scratch(cpu::tile_product_scratch_bytes(product));
  cpu::tile_product(product, scratch.aligned);
  for (int64_t i = 0; project && i < c.m; ++i) {
    for (int64_t j = 0; j < c.r; ++j) {
      double expected = 0.0;
      double magnitude = 1e-30;
      for (int64_t l = 0; l < depth; ++l) {
        const double term = 0.75 * at(x, depth, i, l) * (forward ? at(down, depth, j, l) : at(down, c.r, l, j));
        expected += term;
        magnitude += std::fabs(term);
      }
      CHECK(std::fabs(at(low, c.r, i, j) - expected) <= 0x1p-8 * std::fabs(expected) + 1e-6 * magnitude,
            "low part of m %ld r %ld depth %ld: [%ld, %ld] is %a, expected %a", static_cast<long>(c.m),
            static_cast<long>(c.r), static_cast<long>(depth), static_cast<long>(i), static_cast<long>(j),
            at(low, c.r, i, j), expected);
    }
  }
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double expected = product.bias != nullptr ? oracle::value_of(bias[static_cast<size_t>(j)]) : 0.0;
      double magnitude = std::fabs(expected) + 1e-30;
      const auto add = [&](double term) {
        expected += term;
        magnitude += std::fabs(term);
      };
      for (int64_t l = 0; l < depth; ++l) {
        const int64_t element = forward ? j * c.k + l : l * c.k + j;
        const double w = c.dense ? oracle::value_of(dense[static_cast<size_t>(element)])
                                 : oracle::dequantized(weight.view, element, oracle::Storage<Bf16>::kFormat);
        add(at(x, depth, i, l) * w);
      }
      for (int64_t l = 0; l < c.r; ++l) {
        add(at(low, c.r, i, l) * (forward ? at(up, c.r, j, l) : at(up, width, l, j)));
      }
      const double got = at(y, width, i, j);
      CHECK(std::fabs(got - expected) <= 0x1p-8 * std::fabs(expected) + 1e-6 * magnitude,
            "%s m %ld n %ld k %ld r %ld block %ld: [%ld, %ld] is %a, expected %a", forward ? "forward" : "gradient",
            static_cast<long>(c.m), static_cast<long>(c.n), static_cast<long>(c.k), static_cast<long>(c.r),
            static_cast<long>(c.block_size), static_cast<long>(i), static_cast<long>(j), got, expected);
    }
  }
}

constexpr Case kCases[] = {
    {1, 32, 64, 0, 64, true, false, false},      {16, 32, 64, 16, 64, true, true, false},
    {17, 33, 96, 16, 32, false, true, false},    {33, 100, 67, 5, 64, true, true, false},
    {5, 70, 192, 33, 128, true, false, false},   {40, 96, 576, 16, 64, true, true, false},
    {3, 1, 1, 1, 64, true, true, false},         {70, 65, 130, 16, 4096, false, true, true},
    {20, 4230, 128, 16, 64, true, false, false}, {20, 64, 8256, 16, 64, true, true, false},
    {50, 192, 4160, 8, 4096, true, true, false}, {34, 48, 4097, 3, 64, true, true, false},
    {32, 31, 33, 0, 64, true, false, true},      {20, 64, 300, 3, 32, false, true, false, QuantType::kQ5_0},
};

TEST(tile_products) {
  if (!cpu::have_tiles()) {
    return;
  }
  std::vector<Case> cases(std::begin(kCases), std::end(kCases));
  for (const QuantType type : oracle::kGgufTypes) {
    const int64_t block = oracle::block_of(type);
    cases.push_back({17, 70, 3 * block, 5, block, false, true, false, type});
    cases.push_back({40, 33, 10 * block, 0, block, false, false, false, type});
  }
  for (const Case& c : cases) {
    for (const bool forward : {true, false}) {
      check_product(c, forward, false);
      if (c.r > 0) {
        check_product(c, forward, true);
      }
    }
  }
}

// Of so many tokens and so long a reduction that x is packed in parts: the bits of products of a few tokens, which are
// packed whole. The last turn of tokens and the last part are small.
void check_parts(bool forward, int64_t width, int (*threads)()) {
  constexpr int64_t kTokens = 1050, kDepth = 16 * 1024 + 8 * 32 + 17, kRank = 5, kFew = 30;
  const int64_t n = forward ? width : kDepth;
  const int64_t k = forward ? kDepth : width;
  const oracle::RandomWeight weight(n * k, 64, true, QuantType::kNf4, 1);
  oracle::Random random(2);
  const auto x = random_values(random, kTokens * kDepth);
  const auto low = random_values(random, kTokens * kRank);
  const auto up = random_values(random, kRank * width);
  int (*const before)() = cpu::threads_of_torch.exchange(threads);
  const auto multiply = [&](int64_t first, int64_t count) {
    std::vector<Bf16> y(static_cast<size_t>(count * width));
    TileProduct product{};
    product.forward = forward;
    product.matrix = {&weight.view, nullptr, n, k};
    product.x = x.data() + first * kDepth;
    product.low = low.data() + first * kRank;
    product.up = up.data();
    product.r = kRank;
    product.y = y.data();
    product.m = count;
    const int64_t bytes = cpu::tile_product_scratch_bytes(product);
    CHECK(bytes < (16 << 20), "%ld tokens take %ld bytes", static_cast<long>(count), static_cast<long>(bytes));
    const oracle::Scratch scratch(bytes);
    cpu::tile_product(product, scratch.aligned);
    return y;
  };
  const auto whole = multiply(0, kTokens);
  for (const int64_t first : {int64_t{0}, kTokens / 2, kTokens - kFew}) {
    const auto few = multiply(first, kFew);
    CHECK(std::memcmp(&whole[static_cast<size_t>(first * width)], few.data(), few.size() * sizeof(Bf16)) == 0,
          "%s of width %ld: tokens from %ld on differ", forward ? "forward" : "gradient", static_cast<long>(width),
          static_cast<long>(first));
  }
  cpu::threads_of_torch.store(before);
}

TEST(tile_products_in_parts) {
  if (!cpu::have_tiles()) {
    return;
  }
  check_parts(true, 70, [] { return 2; });
  check_parts(false, 20, [] { return 3; });   // one strip, whose sums would stay in registers, and tokens shared out
  check_parts(false, 530, [] { return 1; });  // two panels
}

TEST(tile_outer_products) {
  if (!cpu::have_tiles()) {
    return;
  }
  for (const auto& [m, r, width] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {33, 16, 64}, {300, 5, 129}, {64, 40, 200}, {31, 17, 63}}) {
    oracle::Random random(static_cast<uint64_t>(m));
    const auto left = random_values(random, m * r);
    const auto right = random_values(random, m * width);
    std::vector<float> out(static_cast<size_t>(r * width));
    const oracle::Scratch scratch(cpu::tile_outer_scratch_bytes(m, r));
    cpu::tile_outer(left.data(), right.data(), m, r, width, 0.5f, out.data(), scratch.aligned);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        double expected = 0.0;
        double magnitude = 1e-30;
        for (int64_t l = 0; l < m; ++l) {
          expected += 0.5 * at(left, r, l, i) * at(right, width, l, j);
          magnitude += std::fabs(at(left, r, l, i) * at(right, width, l, j));
        }
        const double got = out[static_cast<size_t>(i * width + j)];
        CHECK(std::fabs(got - expected) <= 1e-6 * magnitude, "m %ld r %ld width %ld: [%ld, %ld] is %a, expected %a",
              static_cast<long>(m), static_cast<long>(r), static_cast<long>(width), static_cast<long>(i),
              static_cast<long>(j), got, expected);
      }
    }
  }
}

#if defined(__x86_64__) && !defined(QLORA_NATIVE_EMULATE_ISAS)

struct alignas(64) TileConfig {
  uint8_t bytes[64] = {1};
};

__attribute__((target("amx-tile"))) void set_tiles(const TileConfig& config) { _tile_loadconfig(config.bytes); }

__attribute__((target("amx-tile"))) TileConfig take_tiles() {
  TileConfig config;
  _tile_storeconfig(config.bytes);
  _tile_release();
  return config;
}

TEST(tiles_of_the_caller_stay_configured) {
  if (!cpu::have_tiles()) {
    return;
  }
  TileConfig own;
  own.bytes[16] = 32;  // bytes a row of the first tile
  own.bytes[48] = 7;   // and its rows
  for (const TileConfig& before : {own, TileConfig{}}) {
    if (before.bytes[48] != 0) {
      set_tiles(before);
    }
    check_product({33, 100, 96, 5, 64, true, false, false}, true, true);
    const TileConfig after = take_tiles();
    CHECK(after.bytes[48] == before.bytes[48] && after.bytes[0] == (before.bytes[48] != 0), "palette %d, %d rows",
          after.bytes[0], after.bytes[48]);
  }
}

#endif

}  // namespace
