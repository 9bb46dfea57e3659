#include "cuda/matmul_plan.h"

#include <algorithm>
#include <limits>

#include "core/gguf.h"
#include "core/layout.h"

namespace qlora_native::cuda {
namespace {

constexpr int kMostSplits = 32;
constexpr int64_t kFewestSteps = 4;  // of a part: fewer do not fill the pipeline of copies

// What a reduction in parts costs, in steps of a CTA. Estimates, not yet measurements.
constexpr int64_t kStartingSteps = 4;  // to fill the pipeline of copies and to store a tile
constexpr int64_t kPartialSteps = 2;   // to store and read again a tile's sums in fp32, for each CTA
constexpr int64_t kLaunchSteps = 4;    // the second launch

// Tokens up to which a fused kernel beats dequantizing for the library's GEMM: estimates, on the low side, until a card
// has timed both. A step of a 128-row tile takes an A100 1,024 clocks in its MMAs, 690 in issue and about 1,100 in
// shared memory, which overlap (tests/cuda_budgets.json has the counts). At 70 % of the library's rate, a 4090 would
// lose a fifth at 1,024 tokens. Hopper and datacenter Blackwell reach their peak only with instructions that the fused
// kernels do not use.
int64_t most_fused_tokens(int compute_capability) {
  switch (compute_capability / 10) {
    case 9:
      return 128;
    case 10:
    case 11:
      return 32;
    default:
      return 256;
  }
}

int64_t most_shared_bytes(int compute_capability) {  // that a block may ask for (CUDA programming guide, table 27)
  switch (compute_capability) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 90:
    case 100:
    case 103:
    case 110:
      return 227 << 10;
    default:
      return 99 << 10;
  }
}

constexpr int64_t kStaticShared = 2 << 10;  // at most, of the kernels' own tables

int64_t shared_bytes_of(const MatmulQuestion& question, const TileSize& tile) {
  return tile.shared_bytes() +
         (is_gguf(question.type) ? gguf_staged_bytes(kBlockFormats[static_cast<int>(question.type)]) : 0);
}

// The size of tile that these sizes may take: the first that holds m, as larger ones would multiply zeros.
int tile_size(const MatmulQuestion& question) {
  const bool has_blocks = is_gguf(question.type);
  int last = has_blocks ? 2 : 3;
  while (shared_bytes_of(question, tile_of(question.forward, last)) + kStaticShared >
         most_shared_bytes(question.compute_capability)) {
    --last;
  }
  int i = has_blocks ? 1 : 0;
  while (i < last && kTiles[i].rows < question.m) {
    ++i;
  }
  return i;
}

int64_t columns_of(const MatmulQuestion& question) { return question.forward ? question.n : question.k; }  // of y

int64_t steps_of(const MatmulQuestion& question) {
  return ceil_div(question.forward ? question.k : question.n, kReductionStep);
}

int64_t most_splits(const MatmulQuestion& question, const TileSize& tile) {
  const int64_t sums = split_k_workspace_bytes(question.m, columns_of(question), tile, 1);
  return std::max<int64_t>(1,
                           std::min({int64_t{kMostSplits}, steps_of(question) / kFewestSteps, kWorkspaceBytes / sums}));
}

// The number of parts with the shortest time in steps, that of all waves of CTAs; fewer parts unless a tenth is gained.
int splits_of(const MatmulQuestion& question, const TileSize& tile) {
  const int64_t tiles = ceil_div(question.m, tile.rows) * ceil_div(columns_of(question), tile.columns);
  const int64_t steps = steps_of(question);
  constexpr int64_t kReserved = 1 << 10;  // of shared memory, by the driver for each CTA
  const int64_t by_memory = (most_shared_bytes(question.compute_capability) + kReserved) /
                            (shared_bytes_of(question, tile) + kStaticShared + kReserved);
  const int64_t at_once = question.sm_count * std::clamp<int64_t>(by_memory, 1, tile.resident());
  int best = 1;
  int64_t least = std::numeric_limits<int64_t>::max() / 16;
  const int64_t most = most_splits(question, tile);
  for (int splits = 1; splits <= most; ++splits) {
    const int64_t waves = ceil_div(tiles * splits, at_once);
    const int64_t for_parts = splits > 1 ? waves * kPartialSteps + kLaunchSteps : 0;
    const int64_t time = waves * (ceil_div(steps, splits) + kStartingSteps) + for_parts;
    if (10 * time < 9 * least) {
      least = time;
      best = splits;
    }
  }
  return best;
}

MatmulPlan two_step() { return {MatmulKind::kTwoStep, 0, 0, 1, 0, 0, 0}; }

bool takes_gemv(const MatmulQuestion& question) {
  return question.forward && question.m <= kGemvTokens &&
         (is_gguf(question.type) || question.block_size >= kReductionStep);
}

MatmulPlan gemv(const MatmulQuestion& question, int rows) {
  const int tokens = question.m <= 4 ? 4 : question.m <= 8 ? 8 : 16;
  return {MatmulKind::kGemv, tokens, rows, 1, 0, 0, 0};
}

MatmulPlan tiled(const MatmulQuestion& question, const TileSize& tile, int splits) {
  const bool cut = splits > 1;
  return {cut ? MatmulKind::kSplitK : MatmulKind::kTile,
          tile.rows,
          tile.columns,
          splits,
          tile.stages,
          shared_bytes_of(question, tile),
          cut ? split_k_workspace_bytes(question.m, columns_of(question), tile, splits) : 0};
}

}  // namespace

bool rows_are_regular(int64_t n, int64_t k, int64_t block_size, bool forward) {
  return k % kReductionStep == 0 && k % block_size == 0 && (forward || n % 8 == 0);
}

bool fused_is_possible(const MatmulQuestion& question) {
  const bool has_mma = question.dtype == Dtype::kFloat16
                           ? question.compute_capability >= 75
                           : question.dtype == Dtype::kBfloat16 && question.compute_capability >= 80;
  return has_mma &&
         (is_gguf(question.type) ? question.forward && question.k % question.block_size == 0 && question.n % 8 == 0
                                 : rows_are_regular(question.n, question.k, question.block_size, question.forward));
}

int64_t split_k_workspace_bytes(int64_t m, int64_t columns, const TileSize& tile, int splits) {
  return splits * m * ceil_div(columns, tile.columns) * tile.columns * static_cast<int64_t>(sizeof(float));
}

MatmulPlan plan_matmul(const MatmulQuestion& question) {
  const int64_t of_blocks = tile_of(true, 2).rows;  // more tokens would decode them again
  const int64_t most = most_fused_tokens(question.compute_capability);
  const bool wins = question.m <= (is_gguf(question.type) ? std::min(most, of_blocks) : most) || question.low_memory;
  if (!wins || !fused_is_possible(question)) {
    return two_step();
  }
  if (takes_gemv(question)) {
    // The more rows of W a CTA takes, the less often x is read. But about every SM is to have a CTA, and two where x is
    // so small that reading it again costs less than fewer loads under way.
    const bool few = question.m <= 4;
    int rows = few ? 32 : 64;
    while (rows > 16 && 10 * ceil_div(question.n, rows) < 9 * (few ? 2 : 1) * question.sm_count) {
      rows /= 2;
    }
    return gemv(question, rows);
  }
  const TileSize& tile = tile_of(question.forward, tile_size(question));
  return tiled(question, tile, splits_of(question, tile));
}

}  // namespace qlora_native::cuda
