// The products of few tokens with weights in formats of GGUF: every format and edge, and the bytes that they read.
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

TEST(gguf_decoded_to_the_last_bit) {
  for (const QuantType type : oracle::kGgufTypes) {
    for (const int64_t blocks : {3, 16}) {
      const Case c = of_type(type, {16, 40, blocks});
      cuemu::check_one_hot<Bf16>(c, gemv_plan(c, 32));
      cuemu::check_one_hot<Fp16>(c, gemv_plan(c, 16));
    }
  }
}

TEST(gguf_on_turing) {
  const cuemu::WithDevice turing(75);
  const Case c = of_type(QuantType::kQ5_K, {3, 40, 3, true, 8, true});
  Product<Fp16>(c).check(gemv_plan(c, 16));
}

// Bytes of W that a product reads against those that it has: 16 at a time, so that steps of rows which begin between
// two multiples of 16 read some twice, out of the cache.
TEST(gguf_reads_a_weight_once) {
  for (const QuantType type : oracle::kGgufTypes) {
    for (const int64_t m : {1, 16}) {
      const Case c = of_type(type, {m, 32, 4096 / oracle::block_of(type)});
      Product<Bf16> product(c);
      const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(m * c.n));
      cuemu::global_bytes() = {.counts = true, .read = 0, .written = 0};
      CHECK_LAUNCH(product.launch(gemv_plan(c, 16), y));
      const auto read = static_cast<double>(cuemu::global_bytes().read);
      cuemu::global_bytes() = {};
      const double of_x = static_cast<double>(c.n / 16 * 8 * c.k * 2) * (m > 8 ? 2 : 1);  // by the lanes of each warp
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
  CHECK(product.launch(cuemu::tile_plan(c, 0, 1), y) == cudaErrorInvalidValue, "a tile");
  CHECK(product.launch(gemv_plan(c, 48), y) == cudaErrorInvalidValue, "no such number of rows");
  for (Case other : {Case{17, 16, 2}, Case{16, 20, 2}, Case{16, 16, 2, false}}) {
    other = of_type(QuantType::kQ4_0, other);
    CHECK(Product<Bf16>(other).launch(gemv_plan(other, 16), y) == cudaErrorInvalidValue,
          "17 tokens, 20 rows, or a gradient");
  }
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
