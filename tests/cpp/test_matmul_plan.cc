// The choice of a kernel for a product with a 4-bit weight on a GPU: a pure function, so no GPU is needed.
#include <algorithm>
#include <cstdint>

#include "check.h"
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
  check_kind(question(1024, kRtx4090), MatmulKind::kTile);
  check_kind(question(1536, kRtx5090, false), MatmulKind::kTile);
  check_kind(question(1537, kRtx5090), MatmulKind::kTwoStep);
  check_kind(question(256, kA100), MatmulKind::kSplitK);
  check_kind(question(257, kA100), MatmulKind::kTwoStep);
  check_kind(question(64, kH100), MatmulKind::kSplitK);
  check_kind(question(65, kH100), MatmulKind::kTwoStep);
  check_kind(question(33, kB200), MatmulKind::kTwoStep);
  check_kind(question(257, kT4), MatmulKind::kTwoStep);
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
      for (const bool forward : {true, false}) {
        for (const int64_t m : {1, 8, 9, 16, 17, 33, 64, 65, 129, 500, 4096}) {
          for (const int64_t n : {8, 64, 1024, 14336, 128256}) {
            for (const int64_t k : {64, 128, 4096, 14336}) {
              MatmulQuestion asked = question(m, {architecture, sm_count}, forward, n, k);
              asked.low_memory = true;
              const MatmulPlan plan = cuda::plan_matmul(asked);
              const auto fail = [&](const char* what) {
                CHECK(false, "sm_%d x %d, m %ld, n %ld, k %ld, forward %d: %s", architecture, sm_count,
                      static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), forward ? 1 : 0, what);
              };
              if (plan.kind == MatmulKind::kTwoStep || plan.panel_rows != 0) {
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
              const auto* const tile =
                  std::find_if(std::begin(cuda::kTiles), std::end(cuda::kTiles), [&plan](const cuda::TileSize& size) {
                    return size.rows == plan.rows && size.columns == plan.columns && size.stages == plan.stages &&
                           size.shared_bytes() == plan.shared_bytes;
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

TEST(plan_of_the_panel) {
  for (const Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat32}) {
    const int64_t element = dtype == Dtype::kFloat32 ? 4 : 2;
    for (const int64_t n : {1, 1024, 14336, 128256}) {
      for (const int64_t k : {1, 67, 4096, 11008, 14336, 50257}) {
        MatmulQuestion asked = question(4096, kH100, true, n, k);
        asked.dtype = dtype;
        const MatmulPlan plan = cuda::plan_matmul(asked);
        CHECK(plan.kind == MatmulKind::kTwoStep && plan.panel_rows >= 1 && plan.panel_rows <= n,
              "n %ld, k %ld: %ld rows", static_cast<long>(n), static_cast<long>(k), static_cast<long>(plan.panel_rows));
        CHECK(plan.workspace_bytes == plan.panel_rows * k * element && plan.workspace_bytes <= 24 << 20,
              "n %ld, k %ld: %ld bytes", static_cast<long>(n), static_cast<long>(k),
              static_cast<long>(plan.workspace_bytes));
        CHECK(plan.panel_rows == n || plan.panel_rows * k % 32 == 0, "n %ld, k %ld: a panel begins within a run",
              static_cast<long>(n), static_cast<long>(k));
      }
    }
  }
  // A panel of a usual weight begins where a group of nested scales does.
  const MatmulPlan plan = cuda::plan_matmul(question(4096, kH100, true, 14336, 11008));
  CHECK(plan.panel_rows < 14336 && plan.panel_rows * 11008 % (256 * 64) == 0, "%ld rows",
        static_cast<long>(plan.panel_rows));
  // Whatever its size: the fewest rows after which the next panel begins at a multiple of 32 elements.
  CHECK(cuda::plan_matmul(question(4096, kH100, true, 100, 20'000'002)).panel_rows == 16, "a panel of 16 rows");
}

TEST(plan_counts_in_64_bits) {
  MatmulQuestion asked = question(1 << 20, kRtx4090, true, 1 << 20, 1 << 20);
  asked.low_memory = true;
  CHECK(cuda::plan_matmul(asked).kind == MatmulKind::kTile, "2^60 products");
  CHECK(cuda::split_k_workspace_bytes(1 << 20, 1 << 20, cuda::kTiles[3], 32) == int64_t{1} << 47, "2^47 bytes");
}

// ---------------------------------------------------------------------------------------------------------------------
// What the autotuner may choose

using cuda::MatmulChoice;

MatmulChoice choice_of(const MatmulPlan& plan) { return {plan.kind, plan.rows, plan.columns, plan.splits}; }

bool same(const MatmulPlan& a, const MatmulPlan& b) {
  return a.kind == b.kind && a.rows == b.rows && a.columns == b.columns && a.splits == b.splits &&
         a.stages == b.stages && a.shared_bytes == b.shared_bytes && a.workspace_bytes == b.workspace_bytes &&
         a.panel_rows == b.panel_rows;
}

TEST(candidates_of_a_few_sizes) {
  const auto count = [](const MatmulQuestion& asked, MatmulKind kind, int rows, int columns) {
    const auto plans = cuda::candidate_plans(asked);
    return std::count_if(plans.begin(), plans.end(), [kind, rows, columns](const MatmulPlan& plan) {
      return plan.kind == kind && plan.rows == rows && plan.columns == columns;
    });
  };
  MatmulQuestion asked = question(8, kA100);
  for (const int columns : {16, 32, 64}) {
    CHECK(count(asked, MatmulKind::kGemv, 8, columns) == 1, "the few-token kernel with %d rows of W", columns);
  }
  CHECK(count(asked, MatmulKind::kTile, 16, 64) == 1, "a tile over the whole reduction");
  CHECK(count(asked, MatmulKind::kSplitK, 16, 64) == 7, "64 steps in 2, 3, 4, 6, 8, 12 and 16 parts");
  CHECK(count(asked, MatmulKind::kTile, 32, 64) == 0, "a tile of which half is zeros");
  CHECK(count(asked, MatmulKind::kTwoStep, 0, 0) == 1, "two steps");
  asked = question(100, kA100, false);
  for (const cuda::TileSize& tile : cuda::kTiles) {
    CHECK(count(asked, MatmulKind::kTile, tile.rows, tile.columns) == (tile.rows >= 32 ? 1 : 0), "tile of %d rows",
          tile.rows);
  }
  asked.compute_capability = 75;  // where tiles of 128 rows do not fit
  asked.dtype = Dtype::kFloat16;
  CHECK(count(asked, MatmulKind::kTile, 128, 128) == 0 && count(asked, MatmulKind::kTile, 16, 64) == 1, "sm_75");
  asked.dtype = Dtype::kFloat32;
  CHECK(cuda::candidate_plans(asked).size() == 1, "fp32 has two steps alone");
  asked = question(4096, kH100);
  CHECK(cuda::candidate_plans(asked).size() == 4, "two steps and three tiles");
  asked.low_memory = true;
  CHECK(cuda::candidate_plans(asked).size() == 3 && count(asked, MatmulKind::kTwoStep, 0, 0) == 0, "no panel");
}

// The built-in plan comes first, nothing comes twice, each is the plan of its own choice; and what was chosen at the
// bucket's end holds for every token count in it.
TEST(candidates_hold_for_their_whole_bucket) {
  for (const int architecture : kArchitectures) {
    for (const bool forward : {true, false}) {
      for (const bool low_memory : {false, true}) {
        for (const int64_t m : {4, 8, 16, 32, 64, 128, 256, 4096}) {
          for (const int64_t n : {64, 1024, 14336}) {
            for (const int64_t k : {64, 4096, 4160 + 1}) {
              MatmulQuestion asked = question(m, {architecture, 108}, forward, n, k);
              asked.low_memory = low_memory;
              const auto plans = cuda::candidate_plans(asked);
              CHECK(!plans.empty() && same(plans.front(), cuda::plan_matmul(asked)), "the built-in plan is not first");
              for (size_t i = 0; i < plans.size(); ++i) {
                for (size_t j = 0; j < i; ++j) {
                  CHECK(!same(plans[i], plans[j]), "m %ld: plan %zu is plan %zu", static_cast<long>(m), i, j);
                }
                const MatmulChoice choice = choice_of(plans[i]);
                const auto again = cuda::plan_of_choice(asked, choice);
                CHECK(again && same(*again, plans[i]), "m %ld: plan %zu is not its choice's", static_cast<long>(m), i);
                CHECK(!low_memory || !cuda::fused_is_possible(asked) || choice.kind != MatmulKind::kTwoStep, "a panel");
                for (const int64_t fewer : {m / 2 + 1, 3 * m / 4, m - 1}) {
                  MatmulQuestion inside = asked;
                  inside.m = fewer;
                  const auto plan = cuda::plan_of_choice(inside, choice);
                  CHECK(cuda::tokens_bucket(fewer) == m, "%ld tokens are not of bucket %ld", static_cast<long>(fewer),
                        static_cast<long>(m));
                  CHECK(plan && plan->rows == plans[i].rows && plan->splits == plans[i].splits &&
                            plan->workspace_bytes <= plans[i].workspace_bytes,
                        "plan %zu of %ld tokens does not hold for %ld", i, static_cast<long>(m),
                        static_cast<long>(fewer));
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(buckets_of_tokens) {
  for (const int64_t m : {1, 2, 3, 4}) {
    CHECK(cuda::tokens_bucket(m) == 4, "%ld tokens", static_cast<long>(m));
  }
  CHECK(cuda::tokens_bucket(5) == 8 && cuda::tokens_bucket(16) == 16 && cuda::tokens_bucket(17) == 32, "few tokens");
  CHECK(cuda::tokens_bucket(4097) == 8192 && cuda::tokens_bucket((int64_t{1} << 40) + 1) == int64_t{1} << 41, "many");
  for (int64_t m = 1; m <= 128; ++m) {
    for (const bool forward : {true, false}) {
      MatmulQuestion asked = question(m, kA100, forward);
      const MatmulPlan plan = cuda::plan_matmul(asked);
      asked.m = cuda::tokens_bucket(m);
      CHECK(plan.rows == cuda::plan_matmul(asked).rows, "%ld tokens: another tile than at %ld", static_cast<long>(m),
            static_cast<long>(asked.m));
    }
  }
}

TEST(choices_that_no_kernel_has) {
  const MatmulQuestion asked = question(8, kA100);
  const MatmulQuestion many = question(64, kA100);
  struct Wrong {
    MatmulQuestion question;
    MatmulChoice choice;
    const char* what;
  };
  MatmulQuestion frugal = asked;
  frugal.low_memory = true;
  MatmulQuestion single = asked;
  single.dtype = Dtype::kFloat32;
  MatmulQuestion small_blocks = asked;
  small_blocks.block_size = 32;
  const MatmulQuestion turing = {200, 4096, 4096, 0, 64, Dtype::kFloat16, true, false, 75, 40};
  for (const Wrong& wrong :
       {Wrong{asked, {MatmulKind::kGemv, 8, 48, 1}, "48 rows of W"},
        Wrong{asked, {MatmulKind::kGemv, 4, 16, 1}, "4 tokens for 8"},
        Wrong{asked, {MatmulKind::kGemv, 8, 16, 2}, "parts of the few-token kernel"},
        Wrong{many, {MatmulKind::kGemv, 16, 16, 1}, "64 tokens in the few-token kernel"},
        Wrong{question(8, kA100, false), {MatmulKind::kGemv, 8, 16, 1}, "its gradient"},
        Wrong{small_blocks, {MatmulKind::kGemv, 8, 16, 1}, "blocks of 32"},
        Wrong{many, {MatmulKind::kTile, 64, 128, 1}, "no such tile"},
        Wrong{many, {MatmulKind::kTile, 128, 128, 1}, "a tile of which half is zeros"},
        Wrong{turing, {MatmulKind::kTile, 128, 128, 1}, "a tile that does not fit"},
        Wrong{many, {MatmulKind::kTile, 64, 64, 2}, "kTile in parts"},
        Wrong{many, {MatmulKind::kSplitK, 64, 64, 1}, "kSplitK whole"},
        Wrong{many, {MatmulKind::kSplitK, 64, 64, 17}, "parts of less than 4 steps"},
        Wrong{many, {MatmulKind::kSplitK, 64, 64, 0}, "no part"}, Wrong{single, {MatmulKind::kTile, 16, 64, 1}, "fp32"},
        Wrong{frugal, {MatmulKind::kTwoStep, 0, 0, 1}, "a panel with low_memory"}}) {
    CHECK(!cuda::plan_of_choice(wrong.question, wrong.choice), "%s is a plan", wrong.what);
  }
  CHECK(cuda::plan_of_choice(many, {MatmulKind::kSplitK, 64, 64, 16}).has_value(), "16 parts of 4 steps");
  frugal.k = 4096 + 32;
  CHECK(cuda::plan_of_choice(frugal, {MatmulKind::kTwoStep, 0, 0, 1}).has_value(), "where nothing else can");
}

}  // namespace
