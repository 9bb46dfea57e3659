// Index arithmetic of launches beyond what 32 bits hold; none of these is executed.
#include "core/optim.h"
#include "cpp/check.h"
#include "cuda/gradient_norm.h"
#include "cuda/grid.h"
#include "cuda/quantize_4bit.cuh"
#include "cuda/quantize_4bit.h"
#include "cuda/tensor_list.h"

using namespace qlora_native;
using namespace qlora_native::cuda;

namespace {

constexpr int64_t kFew = 2;
constexpr int64_t kBeyond = (int64_t{1} << 31) + 5;

static_assert(grid_blocks(0, 4096) == 1 && grid_blocks(1, 4096) == 1 && grid_blocks(4096, 4096) == 1);
static_assert(grid_blocks(4097, 4096) == 2 && grid_blocks(100, 1, 7) == 7);
static_assert(grid_blocks(kBeyond, 4096) == (1 << 19) + 1);
static_assert(grid_blocks(kBeyond * 4096, 4096) == 0x7fffffffu);
static_assert(first_item(0x7fffffffu, 4096) == int64_t{0x7fffffff} * 4096);
static_assert(at_most(-kBeyond, 8) == 0 && at_most(-1, 8) == 0 && at_most(3, 8) == 3 && at_most(kBeyond, 8) == 8);

// A kernel's loop over chunks, one thread block of it: the chunks it takes are its own, and the grid's are all.
TEST(grid_covers_what_it_strides_over) {
  const int64_t numel = kBeyond * kQuantizeChunk - 3;
  const unsigned grid = grid_blocks(numel, kQuantizeChunk);
  for (const unsigned block : {0u, 5u, 6u, grid - 1}) {
    int64_t rounds = 0;
    int64_t last = -1;
    for (int64_t begin = first_item(block, kQuantizeChunk); begin < numel; begin += first_item(grid, kQuantizeChunk)) {
      CHECK(begin > last && begin % kQuantizeChunk == 0, "%lld after %lld", static_cast<long long>(begin),
            static_cast<long long>(last));
      last = begin;
      ++rounds;
    }
    CHECK(rounds == (block < 6 ? kFew : 1), "block %u goes %lld rounds", block, static_cast<long long>(rounds));
  }
}

TEST(workspaces_of_large_weights) {
  CHECK(quantize_scales_workspace(kBeyond * 256) == 8 * kBeyond, "%lld",
        static_cast<long long>(quantize_scales_workspace(kBeyond * 256)));
  CHECK(gradient_norm_workspace(kBeyond) == 8 * (kBeyond + 1), "%lld",
        static_cast<long long>(gradient_norm_workspace(kBeyond)));
}

TEST(chunks_of_tensors) {
  OptimTensor tensors[4]{};
  tensors[0].numel = 3;
  tensors[2].numel = 2 * kNormChunk;
  tensors[3].numel = 2 * kNormChunk + 1;
  CHECK(count_chunks(tensors, 4) == 6, "%lld", static_cast<long long>(count_chunks(tensors, 4)));
  OptimChunk chunks[6];
  fill_chunks(tensors, 4, chunks);
  constexpr OptimChunk kExpected[6] = {{0, 0}, {2, 0}, {2, 1}, {3, 0}, {3, 1}, {3, 2}};
  for (int i = 0; i < 6; ++i) {
    CHECK(chunks[i].tensor == kExpected[i].tensor && chunks[i].index == kExpected[i].index, "chunk %d", i);
  }
  tensors[1].numel = kBeyond * kNormChunk;
  CHECK(count_chunks(tensors, 2) == kBeyond + 1, "%lld", static_cast<long long>(count_chunks(tensors, 2)));
}

}  // namespace
