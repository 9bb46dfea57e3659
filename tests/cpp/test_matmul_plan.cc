// The choice of a kernel for a product with a 4-bit weight on a GPU: a pure function, so no GPU is needed.
#include <algorithm>
#include <cstdint>

#include "check.h"
#include "core/gguf.h"
#include "core/layout.h"
#include "cuda/matmul_plan.h"

using namespace qlora_native;
using cuda::MatmulKind;
using cuda::MatmulPlan;
using cuda::MatmulQuestion;

namespace {

constexpr int kArchitectures[] = {75, 80, 86, 89, 90, 100, 120};

struct Card {
  int compute_capability;
  int sm_count;
};
constexpr Card kT4{75, 40}, kA100{80, 108}, kRtx4090{89, 128}, kH100{90, 132}, kB200{100, 148}, kRtx5090{120, 170};

MatmulQuestion question(int64_t m, Card card, bool forward = true, int64_t n = 4096, int64_t k = 4096) {
  return {m,
          n,
          k,
          16,
          64,
          card.compute_capability < 80 ? Dtype::kFloat16 : Dtype::kBfloat16,
          forward,
          false,
          card.compute_capability,
          card.sm_count};
}

void check_kind(const MatmulQuestion& asked, MatmulKind expected) {
  const MatmulPlan plan = cuda::plan_matmul(asked);
  CHECK(plan.kind == expected, "m %ld, sm_%d, forward %d: kind %d, expected %d", static_cast<long>(asked.m),
        asked.compute_capability, asked.forward ? 1 : 0, static_cast<int>(plan.kind), static_cast<int>(expected));
}

TEST(plan_by_tokens_and_card) {
  for (const Card card : {kT4, kA100, kRtx4090, kH100, kB200, kRtx5090}) {
    const auto few_parts = card.compute_capability == 75 ? MatmulKind::kTile : MatmulKind::kSplitK;  // 40 SMs
    for (const int64_t m : {1, 4, 8, 16}) {
      check_kind(question(m, card), MatmulKind::kGemv);
      check_kind(question(m, card, false), few_parts);
    }
    check_kind(question(17, card), few_parts);
    check_kind(question(17, card, true, 256 * 64 * 64), MatmulKind::kTile);  // every SM is busy without parts
    check_kind(question(16384, card), MatmulKind::kTwoStep);
    check_kind(question(16384, card, false), MatmulKind::kTwoStep);
  }
  check_kind(question(256, kRtx4090, true, 14336), MatmulKind::kTile);
  check_kind(question(256, kA100), MatmulKind::kSplitK);
  for (const Card card : {kT4, kA100, kRtx4090, kRtx5090}) {
    check_kind(question(257, card), MatmulKind::kTwoStep);
    check_kind(question(257, card, false), MatmulKind::kTwoStep);
  }
  check_kind(question(128, kH100), MatmulKind::kSplitK);
  check_kind(question(129, kH100), MatmulKind::kTwoStep);
  check_kind(question(33, kB200), MatmulKind::kTwoStep);
}

TEST(plan_with_low_memory_takes_the_fused_kernel_wherever_there_is_one) {
  for (const Card card : {kT4, kA100, kRtx4090, kH100, kB200, kRtx5090}) {
    for (const bool forward : {true, false}) {
      MatmulQuestion asked = question(16384, card, forward, 14336);
      asked.low_memory = true;
      check_kind(asked, MatmulKind::kTile);
      asked.k = 4096 + 32;  // blocks cross rows: nothing else can
      check_kind(asked, MatmulKind::kTwoStep);
    }
  }
}

TEST(plan_where_no_fused_kernel_can) {
  const MatmulQuestion good = question(4, kA100);
  check_kind(good, MatmulKind::kGemv);
  MatmulQuestion asked = good;
  asked.dtype = Dtype::kFloat32;
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.compute_capability = 75;  // bf16
  check_kind(asked, MatmulKind::kTwoStep);
  asked.dtype = Dtype::kFloat16;
  check_kind(asked, MatmulKind::kGemv);
  for (const int64_t k : {1, 32, 96, 4160 + 1}) {
    asked = good;
    asked.k = k;
    check_kind(asked, MatmulKind::kTwoStep);
  }
  asked = good;
  asked.block_size = 128;
  asked.k = 4096 + 64;
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.n = 4099;  // forward only writes rows of n elements
  check_kind(asked, MatmulKind::kGemv);
  asked.forward = false;  // the gradient reads them, 16 bytes at a time
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.block_size = 32;  // two scales in the 64 weights that share the few-token kernel's accumulators
  check_kind(asked, MatmulKind::kSplitK);
}

// Forward, with rows of whole blocks; nothing else, whatever the memory. More tokens than a tile has are decoded for
// anew, which only a lack of memory makes worth it.
TEST(plan_of_gguf) {
  MatmulQuestion asked = question(16, kA100, true, 4104, 4096 + 32);
  asked.type = QuantType::kQ4_0;
  asked.block_size = 32;
  asked.low_memory = true;
  check_kind(asked, MatmulKind::kGemv);
  const MatmulQuestion good = asked;
  for (const int64_t m : {17, 32, 33, 64, 65, 4096}) {
    asked.m = m;
    check_kind(asked, m < 66 ? MatmulKind::kSplitK : MatmulKind::kTile);
    CHECK(cuda::plan_matmul(asked).rows == (m < 33 ? 32 : 64), "m %ld", static_cast<long>(m));
    asked.low_memory = false;
    check_kind(asked, m < 65 ? MatmulKind::kSplitK : MatmulKind::kTwoStep);
    asked.low_memory = true;
  }
  asked.m = 33;
  asked.low_memory = false;
  asked.compute_capability = 100;  // as of other weights
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.forward = false;
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.k += 16;
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.n -= 4;  // copies take 16 bytes, of which the last may then lie beyond the weight
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.dtype = Dtype::kFloat32;
  check_kind(asked, MatmulKind::kTwoStep);
  asked = good;
  asked.type = QuantType::kQ6_K;
  asked.block_size = 256;
  check_kind(asked, MatmulKind::kTwoStep);
  asked.k = 4096;
  check_kind(asked, MatmulKind::kGemv);
}

int64_t most_shared_bytes(int compute_capability) {  // a block's limit, as the programming guide's table has it
  return compute_capability == 75                                ? 65536
         : compute_capability == 80                              ? 166912
         : compute_capability == 90 || compute_capability == 100 ? 232448
                                                                 : 101376;
}

// Whatever the sizes: a tile that exists and fits the card, parts that are not empty, a workspace that holds them.
TEST(plan_is_consistent_for_all_sizes) {
  for (const int architecture : kArchitectures) {
    for (const int sm_count : {1, 20, 132}) {
      for (const QuantType type : {QuantType::kNf4, QuantType::kQ8_0, QuantType::kQ4_K}) {
        const BlockFormat& format = kBlockFormats[static_cast<int>(type)];
        const int staged = is_gguf(type) ? cuda::gguf_staged_bytes(format) : 0;
        for (const bool forward : {true, false}) {
          for (const int64_t m : {1, 8, 9, 16, 17, 33, 64, 65, 129, 500, 4096}) {
            for (const int64_t n : {8, 64, 1024, 14336, 128256}) {
              for (const int64_t k : {64, 128, 4096, 14336}) {
                MatmulQuestion asked = question(m, {architecture, sm_count}, forward, n, k);
                asked.low_memory = true;
                asked.type = type;
                asked.block_size = is_gguf(type) ? format.elements : 64;
                if (is_gguf(type) && (!forward || k % format.elements != 0)) {
                  check_kind(asked, MatmulKind::kTwoStep);
                  continue;
                }
                const MatmulPlan plan = cuda::plan_matmul(asked);
                const auto fail = [&](const char* what) {
                  CHECK(false, "sm_%d x %d, m %ld, n %ld, k %ld, forward %d: %s", architecture, sm_count,
                        static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), forward ? 1 : 0, what);
                };
                if (plan.kind == MatmulKind::kTwoStep) {
                  fail("not fused");
                }
                if (plan.shared_bytes + 1152 > most_shared_bytes(architecture)) {
                  fail("too much shared memory");
                }
                if (plan.kind == MatmulKind::kGemv) {
                  const bool wide = plan.columns == 16 || plan.columns == 32 || plan.columns == 64;
                  if (m > 16 || !forward || plan.rows < m || !wide || plan.workspace_bytes != 0) {
                    fail("gemv");
                  }
                  continue;
                }
                const auto* const tile = std::find_if(
                    std::begin(cuda::kTiles), std::end(cuda::kTiles), [&plan, staged](const cuda::TileSize& size) {
                      return size.rows == plan.rows && size.columns == plan.columns && size.stages == plan.stages &&
                             size.shared_bytes() + staged == plan.shared_bytes;
                    });
                if (tile == std::end(cuda::kTiles)) {
                  fail("no such tile");
                  continue;
                }
                const int64_t steps = ceil_div(forward ? k : n, 64);
                if (plan.splits < 1 || plan.splits > steps || (plan.kind == MatmulKind::kSplitK) != (plan.splits > 1)) {
                  fail("splits");
                }
                const int64_t columns = ceil_div(forward ? n : k, plan.columns) * plan.columns;
                if (plan.workspace_bytes != (plan.splits > 1 ? plan.splits * m * columns * 4 : 0) ||
                    plan.workspace_bytes > 24 << 20) {
                  fail("workspace");
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(plan_fills_the_card) {
  for (const int64_t m : {17, 32, 64}) {
    const MatmulPlan plan = cuda::plan_matmul(question(m, kRtx4090));
    const int64_t ctas = ceil_div(m, plan.rows) * ceil_div(4096, plan.columns) * plan.splits;
    CHECK(ctas >= 128, "m %ld: %ld CTAs", static_cast<long>(m), static_cast<long>(ctas));
  }
  // More rows of W a CTA only if every SM still gets one.
  CHECK(cuda::plan_matmul(question(1, kH100, true, 14336)).columns == 32, "a large weight");
  CHECK(cuda::plan_matmul(question(8, kH100, true, 14336)).columns == 64, "a large weight and 8 tokens");
  CHECK(cuda::plan_matmul(question(16, kH100)).columns == 32, "128 CTAs for 132 SMs");
  CHECK(cuda::plan_matmul(question(1, kH100)).columns == 16, "two CTAs an SM");
  CHECK(cuda::plan_matmul(question(1, kH100, true, 1024)).columns == 16, "a small weight");
}

TEST(plan_counts_in_64_bits) {
  MatmulQuestion asked = question(1 << 20, kRtx4090, true, 1 << 20, 1 << 20);
  asked.low_memory = true;
  CHECK(cuda::plan_matmul(asked).kind == MatmulKind::kTile, "2^60 products");
  CHECK(cuda::split_k_workspace_bytes(1 << 20, 1 << 20, cuda::kTiles[3], 32) == int64_t{1} << 47, "2^47 bytes");
}

}  // namespace
