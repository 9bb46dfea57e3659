#include "cpu/kernels/tiles.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kTokenBytes = 32 << 20;  // of packed tokens: longer inputs go in turns
// A turn decodes the whole weight, so it has this many tokens at least: where they are too long, parts of the reduction
// are packed one after the other. Measured: parts of 4 to 8 MiB are the fastest.
constexpr int64_t kLeastTurn = 1024;
constexpr int64_t kPartBytes = 8 << 20;
constexpr int64_t kSumBytes = kTileRows * kTileRows * static_cast<int64_t>(sizeof(float));

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// How a product is cut: turns of tokens, parts of the reduction, a grid of threads over columns and tokens, panels of
// columns.
struct Plan {
  int64_t steps;
  int64_t low_steps;
  int64_t width;
  int64_t turn;          // tokens
  int64_t packed_steps;  // of a part
  int64_t column_threads;
  int64_t token_threads;
  int64_t columns;  // of a panel
  int64_t panel_steps;
  int64_t token_bytes;
  int64_t low_bytes;
  int64_t scale_bytes;
  int64_t panel_bytes;
  int64_t partial_bytes;

  Plan(const TileProduct& product, int64_t y_columns, int64_t threads) {
    const TileMatrix& matrix = product.matrix;
    const int64_t depth = product.forward ? matrix.columns : matrix.rows;
    width = product.forward ? matrix.rows : matrix.columns;
    steps = ceil_div(depth, kTileStep);
    low_steps = product.low == nullptr && product.down == nullptr ? 0 : ceil_div(product.r, kTileStep);
    const int64_t pair_bytes = 2 * steps * kTileBytes;  // of two groups of tokens
    int64_t turn_pairs = std::max<int64_t>(1, kTokenBytes / std::max<int64_t>(1, pair_bytes));
    if (product.down == nullptr) {  // which meets whole tokens; what is kept of parts is as bounded as they are
      turn_pairs =
          std::max(turn_pairs, std::min(kLeastTurn, kTokenBytes / (4 * std::max<int64_t>(1, width))) / (2 * kTileRows));
    }
    turn = std::min(turn_pairs * 2 * kTileRows, ceil_div(product.m, kTileRows) * kTileRows);
    const int64_t strips = std::max<int64_t>(1, ceil_div(y_columns, kTileStrip));
    const int64_t pairs = ceil_div(turn, 2 * kTileRows);
    column_threads = std::max<int64_t>(1, std::min(threads, strips));
    token_threads = std::max<int64_t>(1, std::min(threads / column_threads, pairs));
    const int64_t thread_strips = ceil_div(strips, column_threads);
    const int64_t thread_pairs = ceil_div(pairs, token_threads);
    // Measured: 8 steps of 2 groups of tokens (16 KiB) stay in the first cache while a panel of 256 to 512 columns
    // passes from the second. With few tokens a forward product takes one strip at a time, whose panel stays in the
    // first cache; the input gradient always takes many columns, because it reads every row of the weight.
    panel_steps = std::min<int64_t>(steps, 8);
    columns = std::min<int64_t>(!product.forward    ? kMostColumns
                                : thread_pairs <= 2 ? kTileStrip
                                                    : 256,
                                thread_strips * kTileStrip);
    const int64_t strip_bytes = (panel_steps + low_steps) * kPanelStep * static_cast<int64_t>(sizeof(Bf16));
    const int64_t step_bytes = turn / kTileRows * kTileBytes;
    const bool in_parts = product.down == nullptr && steps * step_bytes > kTokenBytes;
    packed_steps = in_parts ? std::max<int64_t>(1, kPartBytes / (panel_steps * step_bytes)) * panel_steps : steps;
    token_bytes = aligned(packed_steps * step_bytes);
    low_bytes = aligned(turn / kTileRows * low_steps * kTileBytes);
    const bool nested = matrix.weight != nullptr && matrix.weight->absmax_codes != nullptr;
    scale_bytes = nested ? aligned(num_blocks(matrix.weight->numel, matrix.weight->block_size) * 4) : 0;
    panel_bytes = aligned(columns / kTileStrip * strip_bytes);
    const bool in_registers = steps <= panel_steps || (thread_pairs == 1 && columns == kTileStrip);
    partial_bytes = in_parts       ? thread_pairs * thread_strips * 4 * kSumBytes
                    : in_registers ? 0
                                   : thread_pairs * (columns / kTileStrip) * 4 * kSumBytes;
  }

  int64_t threads() const { return column_threads * token_threads; }
  int64_t thread_bytes() const { return panel_bytes + partial_bytes; }
  float* partial(unsigned char* thread) const {
    return partial_bytes == 0 ? nullptr : reinterpret_cast<float*>(thread + panel_bytes);
  }
  int64_t bytes() const { return token_bytes + low_bytes + scale_bytes + threads() * thread_bytes(); }
};

const TileKernels& tiles() { return *kernels().tiles; }

// low = x down^T or x down, from packed x; the threads share out the tokens.
void project(const TileProduct& product, const Plan& plan, const Bf16* packed, Bf16* low, int64_t m,
             unsigned char* scratch) {
  TileJob job{};
  job.source = {nullptr, nullptr, product.down, product.forward ? product.r : product.matrix.rows,
                product.forward ? product.matrix.columns : product.r};
  job.tokens = packed;
  job.last_step = plan.steps;
  job.steps = plan.steps;
  job.scale = product.down_scale;
  job.y = low;
  job.m = m;
  job.width = product.r;
  const auto multiply = product.forward ? tiles().forward : tiles().gradient;
  const int64_t groups = ceil_div(m, kTileRows);
  const int64_t pairs = ceil_div(groups, 2);
  const int64_t shares = std::min(plan.threads(), pairs);
  // One strip at a time: its sums fit where the product's own will stand.
  parallel_for(shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      unsigned char* const mine = scratch + i * plan.thread_bytes();
      const TileRange range{0, product.r, pairs * i / shares * 2, std::min(pairs * (i + 1) / shares * 2, groups)};
      multiply(job, range, {kTileStrip, plan.panel_steps, reinterpret_cast<Bf16*>(mine), plan.partial(mine)});
    }
  });
}

int64_t width_of(const TileProduct& product) { return product.forward ? product.matrix.rows : product.matrix.columns; }

// Columns [first, last) of y.
void multiply_columns(const TileProduct& product, const Plan& plan, int64_t first_column, int64_t last_column,
                      unsigned char* scratch) {
  const TileMatrix& matrix = product.matrix;
  auto* packed = reinterpret_cast<Bf16*>(scratch);
  auto* packed_low = reinterpret_cast<Bf16*>(scratch + plan.token_bytes);
  auto* scales = reinterpret_cast<float*>(scratch + plan.token_bytes + plan.low_bytes);
  unsigned char* const own = scratch + plan.token_bytes + plan.low_bytes + plan.scale_bytes;
  const int64_t depth = product.forward ? matrix.columns : matrix.rows;
  const auto pack = product.forward ? tiles().pack_forward : tiles().pack_gradient;
  const auto multiply = product.forward ? tiles().forward : tiles().gradient;

  TileJob job{};
  job.source = {matrix.weight, matrix.weight == nullptr ? nullptr : matrix.weight->absmax, matrix.dense, matrix.rows,
                matrix.columns};
  if (plan.scale_bytes > 0) {
    parallel_for(num_blocks(matrix.weight->numel, matrix.weight->block_size), 4096, [&](int64_t begin, int64_t end) {
      kernels().decode_scales(*matrix.weight, begin, end, scales + begin);
    });
    job.source.scales = scales;
  }
  job.tokens = packed;
  job.steps = plan.steps;
  job.up = {nullptr, nullptr, product.up, product.forward ? plan.width : product.r,
            product.forward ? product.r : plan.width};
  job.low = packed_low;
  job.low_steps = plan.low_steps;
  job.bias = product.bias;
  job.scale = 1.0f;
  job.width = plan.width;
  for (int64_t token = 0; token < product.m; token += plan.turn) {
    job.m = std::min(plan.turn, product.m - token);
    job.y = product.y + token * plan.width;
    const int64_t groups = ceil_div(job.m, kTileRows);
    const Bf16* const x = product.x + token * depth;
    const int64_t strips = ceil_div(last_column - first_column, kTileStrip);
    const int64_t pairs = ceil_div(groups, 2);
    const Bf16* low = product.low == nullptr ? nullptr : product.low + token * product.r;
    for (int64_t step = 0; step < plan.steps; step += plan.packed_steps) {
      job.first_step = step;
      job.last_step = std::min(step + plan.packed_steps, plan.steps);
      const int64_t first = step * kTileStep;
      const int64_t elements = std::min(job.last_step * kTileStep, depth) - first;
      parallel_for(groups, 1,
                   [&](int64_t begin, int64_t end) { pack(x + first, job.m, elements, depth, begin, end, packed); });
      if (product.down != nullptr) {  // and there is one part
        Bf16* const made = product.made_low + token * product.r;
        low = made;
        project(product, plan, packed, made, job.m, own);
      }
      if (strips == 0) {
        continue;
      }
      if (plan.low_steps > 0 && job.last_step == plan.steps) {
        parallel_for(groups, 16, [&](int64_t begin, int64_t end) {
          pack(low, job.m, product.r, product.r, begin, end, packed_low);
        });
      }
      parallel_for(plan.threads(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t c = i % plan.column_threads;
          const int64_t t = i / plan.column_threads;
          TileRange range{};
          range.first_column = first_column + strips * c / plan.column_threads * kTileStrip;
          range.last_column = std::min(first_column + strips * (c + 1) / plan.column_threads * kTileStrip, last_column);
          range.first_group = pairs * t / plan.token_threads * 2;
          range.last_group = std::min(pairs * (t + 1) / plan.token_threads * 2, groups);
          unsigned char* const mine = own + i * plan.thread_bytes();
          multiply(job, range, {plan.columns, plan.panel_steps, reinterpret_cast<Bf16*>(mine), plan.partial(mine)});
        }
      });
    }
  }
}

}  // namespace

bool have_tiles() { return kernels().tiles != nullptr; }

int64_t tile_product_scratch_bytes(const TileProduct& product) {
  return Plan(product, width_of(product), available_threads()).bytes();
}

void tile_product(const TileProduct& product, unsigned char* scratch) {
  const int64_t width = width_of(product);
  if (product.m > 0 && width > 0) {
    multiply_columns(product, Plan(product, width, available_threads()), 0, width, scratch);
  }
}

int64_t tile_part_scratch_bytes(const TileProduct& product, int64_t columns) {
  return Plan(product, columns, 1).bytes();
}

void tile_part(const TileProduct& product, int64_t first, int64_t last, unsigned char* scratch) {
  multiply_columns(product, Plan(product, last - first, 1), first, last, scratch);
}

int64_t tile_outer_scratch_bytes(int64_t m, int64_t r) {
  return ceil_div(r, kTileRows) * ceil_div(m, kTileStep) * kTileBytes;
}

void tile_outer(const Bf16* left, const Bf16* right, int64_t m, int64_t r, int64_t width, float scale, float* out,
                unsigned char* scratch) {
  auto* packed = reinterpret_cast<Bf16*>(scratch);
  tiles().pack_outer(left, m, r, packed);
  parallel_for(ceil_div(width, 64), 1, [&](int64_t begin, int64_t end) {
    tiles().outer(packed, r, right, m, width, scale, begin * 64, std::min(end * 64, width), out);
  });
}

void tile_outer_part(const Bf16* left, const Bf16* right, int64_t m, int64_t r, int64_t width, float scale,
                     int64_t first, int64_t last, float* out, unsigned char* scratch) {
  auto* packed = reinterpret_cast<Bf16*>(scratch);
  tiles().pack_outer(left, m, r, packed);
  tiles().outer(packed, r, right, m, width, scale, first, last, out);
}

}  // namespace qlora_native::cpu
