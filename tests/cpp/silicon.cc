#include "silicon.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "check.h"
#include "cpu/isa/isa.h"
#include "cpu/kernels/gemm.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

struct Recorded {
  const char* test;
  uint64_t avx512;
  uint64_t avx512_bf16;
};

// On an AMD EPYC of the Zen 4 kind. After a change of a kernel's arithmetic: what the failing tests print on one.
constexpr Recorded kRecorded[] = {
    {"causal_attention_bf16", 0xef127e296124b9fb, 0x69991473899ebdf3},
    {"causal_attention_fp16", 0x34dd1a3da0cce589, 0x34dd1a3da0cce589},
    {"causal_attention_fp32", 0x6f9e3d18dbc19121, 0x6f9e3d18dbc19121},
    {"causal_attention_of_a_group_in_turns", 0x9d5a1aee340ccf20, 0x9d5a1aee340ccf20},
    {"dense_rows", 0x2cec02edc9bbb6ef, 0x2cec02edc9bbb6ef},
    {"linear_bf16", 0xc70a85afd80ba94a, 0xc7496bd098724a6c},
    {"linear_fp16", 0xea54a138c200a996, 0xea54a138c200a996},
    {"linear_fp32", 0x8f1e97182021dc20, 0x8f1e97182021dc20},
    {"linear_gguf_bf16", 0x3d197dd0681ad333, 0xcc63d7678eb8c573},
    {"linear_gguf_fp16", 0xb3a3ad70e002e6eb, 0xb3a3ad70e002e6eb},
    {"linear_gguf_fp32", 0x24590ff232fd4715, 0x24590ff232fd4715},
    {"outer_products", 0x5eef8c03023ff1f3, 0x5e095992725738f5},
    {"product_bf16", 0xf578d7e0c7c491e3, 0x38a267207683ece0},
    {"product_bf16_by_dot_products_of_pairs", 0, 0x38a267207683ece0},
    {"product_fp16", 0x3474fa41322d4bbe, 0x3474fa41322d4bbe},
    {"product_fp32", 0x71783d8d8778e61d, 0x71783d8d8778e61d},
    {"product_gguf_bf16", 0x962d6db3b539dc67, 0x9a65b3179751aad1},
    {"product_gguf_bf16_by_dot_products_of_pairs", 0, 0x9a65b3179751aad1},
    {"product_gguf_fp16", 0x1026a78a46f399bf, 0x1026a78a46f399bf},
    {"product_gguf_fp32", 0x78b214538ac73ab9, 0x78b214538ac73ab9},
    {"product_makes_its_low_rank_part", 0x8abfa9f4a3c12fd6, 0xf870815125ee0154},
    {"product_of_extreme_values", 0xfbcf582a4eacbf44, 0xf462696f932282c4},
};

constexpr uint64_t kEmpty = 0xcbf29ce484222325;  // FNV-1a
uint64_t digest = kEmpty;

}  // namespace

void silicon::add(const void* values, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    digest = (digest ^ static_cast<const unsigned char*>(values)[i]) * 0x100000001b3;
  }
}

void silicon::settle(const char* test) {
  const uint64_t got = std::exchange(digest, kEmpty);
  const bool pairs = cpu::current_isa() == cpu::Isa::kAvx512Bf16;
  if (got == kEmpty || (cpu::current_isa() != cpu::Isa::kAvx512 && (!pairs || cpu::bf16_dot_is_slow()))) {
    return;  // where it is slow, bf16 products are not by vdpbf16ps
  }
  for (const Recorded& row : kRecorded) {
    if (std::strcmp(row.test, test) == 0) {
      CHECK(got == (pairs ? row.avx512_bf16 : row.avx512), "%s: the digest is 0x%016lx", test, got);
      return;
    }
  }
  CHECK(false, "%s: no digest is recorded; it is 0x%016lx", test, got);
}

namespace {

// Sums of products that are subnormal, or beyond the largest float: what an instruction flushes to zero, and when.
template <typename T>
void multiply_extremes(bool forward, int sign) {
  constexpr int64_t kM = 5;
  constexpr int64_t kN = 40;
  constexpr int64_t kK = 96;
  oracle::Random random(7);
  const auto extremes = [&](int64_t count) {
    std::vector<T> made;
    for (int64_t i = 0; i < count; ++i) {
      made.push_back(from_float<T>(std::ldexp(random.uniform(), sign * (50 + random.byte() % 30))));
    }
    return made;
  };
  const std::vector<T> x = extremes(kM * (forward ? kK : kN));
  const std::vector<T> w = extremes(kN * kK);
  std::vector<T> y(static_cast<size_t>(kM * (forward ? kN : kK)));
  cpu::GemmJob job{};
  job.dtype = oracle::Storage<T>::kDtype;
  job.forward = forward;
  job.x = x.data();
  job.dense = w.data();
  job.scale = 1.0f;
  job.y = y.data();
  job.m = kM;
  job.n = kN;
  job.k = kK;
  const oracle::Scratch scratch(cpu::gemm_scratch_bytes(job));
  cpu::gemm(job, scratch.aligned);
  silicon::add(y);
}

TEST(product_of_extreme_values) {
  for (const bool forward : {true, false}) {
    for (const int sign : {-1, 1}) {
      multiply_extremes<float>(forward, sign);
      multiply_extremes<Bf16>(forward, sign);
    }
  }
}

}  // namespace
