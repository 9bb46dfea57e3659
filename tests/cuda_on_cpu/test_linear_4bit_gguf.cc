// Products with weights in formats of GGUF: every format and edge, and the bytes that they read.
#include <cstdint>
#include <string_view>
#include <vector>

#include "cuda/linear_4bit_gguf.cuh"
#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/product.h"

using namespace qlora_native;
using cuemu::Case;
using cuemu::gemv_plan;
using cuemu::Product;
using cuemu::tile_plan;

namespace {

Case of_type(QuantType type, Case c) {
  c.type = type;
  c.block_size = oracle::block_of(type);
  c.k *= c.block_size;
  c.nested = false;
  return c;
}

template <typename T>
void check_type(QuantType type) {
  const bool is_small = oracle::block_of(type) == 32;
  const std::vector<Case> cases = {
      {1, 16, 1},                                   // most warps have nothing to do
      {3, 24, is_small ? 7 : 3, true, 5, true},     // rows at odd multiples of 2 bytes; a step that ends early
      {8, 40, is_small ? 40 : 5, true, 8, true},    // turns of every warp
      {9, 72, is_small ? 13 : 2, true, 3},          // the second group of tokens, and rows beyond the edge
      {16, 64, is_small ? 65 : 9, true, 16, true},  // the last step holds one block
  };
  for (const Case& given : cases) {
    const Case c = of_type(type, given);
    Product<T> product(c);
    product.check(gemv_plan(c, c.n % 3 == 0 ? 64 : c.n % 5 == 0 ? 32 : 16));
  }
}

TEST(gguf_bf16) {
  for (const QuantType type : oracle::kGgufTypes) {
    check_type<Bf16>(type);
  }
}

TEST(gguf_fp16) {
  for (const QuantType type : oracle::kGgufTypes) {
    check_type<Fp16>(type);
  }
}

// Tiles of 32 and of 64 tokens, whole and in parts; rows of W beyond the edge, and steps that end early.
template <typename T>
void check_tiles(QuantType type) {
  const bool is_small = oracle::block_of(type) == 32;
  struct Tiled {
    Case of;
    int tile;
    int splits;
  };
  const std::vector<Tiled> cases = {
      {{17, 40, is_small ? 3 : 1}, 1, 1},
      {{24, 72, is_small ? 23 : 3, true, 5, true}, 1, 2},
      {{33, 136, is_small ? 21 : 3, true, 16}, 2, 2},
      {{48, 64, is_small ? 40 : 5, true, 8, true}, 2, 3},
      {{64, 24, is_small ? 29 : 4, true, 72, true}, 2, 1},  // every stage of the blocks again
      {{70, 64, is_small ? 9 : 2}, 2, 1},                   // a second tile of tokens
  };
  for (const Tiled& given : cases) {
    const Case c = of_type(type, given.of);
    Product<T>(c).check(tile_plan(c, given.tile, given.splits));
  }
}

TEST(gguf_tiles_bf16) {
  for (const QuantType type : oracle::kGgufTypes) {
    check_tiles<Bf16>(type);
  }
}

TEST(gguf_tiles_fp16) {
  for (const QuantType type : oracle::kGgufTypes) {
    check_tiles<Fp16>(type);
  }
}

TEST(gguf_decoded_to_the_last_bit) {
  for (const QuantType type : oracle::kGgufTypes) {
    for (const int64_t blocks : {3, 16}) {
      const Case c = of_type(type, {16, 40, blocks});
      cuemu::check_one_hot<Bf16>(c, gemv_plan(c, 32));
      cuemu::check_one_hot<Fp16>(c, gemv_plan(c, 16));
      const Case more = of_type(type, {40, 40, blocks});
      cuemu::check_one_hot<Bf16>(more, tile_plan(more, 2, 1));
      cuemu::check_one_hot<Fp16>(more, tile_plan(more, 1, 1));
    }
  }
}

TEST(gguf_on_turing) {
  const cuemu::WithDevice turing(75);
  const Case c = of_type(QuantType::kQ5_K, {3, 40, 3, true, 8, true});
  Product<Fp16>(c).check(gemv_plan(c, 16));
}

// The choice of plan_matmul, run as it is: on a T4 the blocks of Q8_0 leave no room for 64 tokens.
TEST(gguf_planned) {
  for (const int architecture : {75, 86}) {
    const cuemu::WithDevice device(architecture);
    for (const QuantType type : {QuantType::kQ4_K, QuantType::kQ8_0}) {
      const Case c = of_type(type, {64, 72, 1024 / oracle::block_of(type), true, 8});
      const cuda::MatmulPlan plan =
          cuda::plan_matmul({c.m, c.n, c.k, c.r, c.block_size, Dtype::kFloat16, true, false, architecture, 40, type});
      CHECK(plan.rows == (architecture == 75 && type == QuantType::kQ8_0 ? 32 : 64), "%d rows", plan.rows);
      cuemu::take_launches();
      Product<Fp16>(c).check(plan);
      CHECK(cuemu::take_launches()[0].shared_bytes == static_cast<size_t>(plan.shared_bytes), "sm_%d", architecture);
    }
  }
}

// Bytes of W that a product reads against those that it has: 16 at a time, so that steps of rows which begin between
// two multiples of 16 read some twice, out of the cache.
TEST(gguf_reads_a_weight_once) {
  for (const QuantType type : oracle::kGgufTypes) {
    for (const int64_t m : {1, 16, 17, 64}) {
      const bool is_tile = m > 16;
      const Case c = of_type(type, {m, is_tile ? 64 : 32, 4096 / oracle::block_of(type)});
      Product<Bf16> product(c);
      const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(m * c.n));
      cuemu::global_bytes() = {.counts = true, .read = 0, .written = 0};
      CHECK_LAUNCH(product.launch(is_tile ? tile_plan(c, m > 32 ? 2 : 1, 1) : gemv_plan(c, 16), y));
      const auto read = static_cast<double>(cuemu::global_bytes().read);
      cuemu::global_bytes() = {};
      const int64_t tokens = is_tile ? m : c.n / 16 * (m > 8 ? 16 : 8);  // read once, or by the lanes of each warp
      const auto of_x = static_cast<double>(tokens * c.k * 2);
      const auto stored = static_cast<double>(packed_bytes(type, c.n * c.k));
      const double times = (read - of_x) / stored;
      const bool counts = std::string_view(CUEMU_BUILD) == "race";
      const double most = type == QuantType::kQ6_K || type == QuantType::kMxfp4 ? 1.07 : 1.0;
      CHECK(!counts || (times >= 1.0 && times <= most), "type %d, m %ld: %.4f times its bytes", static_cast<int>(type),
            static_cast<long>(m), times);
    }
  }
}

TEST(gguf_refused) {
  const Case c = of_type(QuantType::kQ4_0, {16, 16, 2});
  Product<Bf16> product(c);
  const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(17 * 16));
  cuemu::take_launches();
  CHECK(product.launch(tile_plan(c, 0, 1), y) == cudaErrorInvalidValue, "a tile of 16 tokens");
  CHECK(product.launch(gemv_plan(c, 48), y) == cudaErrorInvalidValue, "no such number of rows");
  for (Case other : {Case{17, 16, 2}, Case{16, 20, 2}, Case{16, 16, 2, false}}) {
    other = of_type(QuantType::kQ4_0, other);
    const bool is_tiled = other.m == 17 && other.n == 16;
    CHECK(is_tiled || Product<Bf16>(other).launch(tile_plan(other, 1, 1), y) == cudaErrorInvalidValue,
          "a tile of 20 rows, or of a gradient");
    CHECK(Product<Bf16>(other).launch(gemv_plan(other, 16), y) == cudaErrorInvalidValue,
          "17 tokens, 20 rows, or a gradient");
  }
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
