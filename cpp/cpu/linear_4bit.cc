#include "cpu/linear_4bit.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace qlora_native::cpu {
namespace {

enum class Path { kRows, kDenseRows, kTiles, kGemm };

int64_t index_of(Dtype dtype) { return static_cast<int64_t>(dtype); }

bool takes_tiles(Dtype dtype) { return dtype == Dtype::kBfloat16 && have_tiles(); }

Path path_of(const GemmJob& job) {
  const bool tiles = takes_tiles(job.dtype);
  if (job.forward && job.dense == nullptr) {
    const bool reorders = kernels().reorder_tokens[index_of(job.dtype)] != nullptr;
    if (job.m <= (tiles ? kFewRows : reorders ? kStreamTokens : kMaxTokens)) {
      return Path::kRows;
    }
  } else if (job.forward && job.m <= kMaxTokens && job.bias == nullptr && job.scale == 1.0f) {
    return Path::kDenseRows;
  }
  return tiles && job.scale == 1.0f ? Path::kTiles : Path::kGemm;
}

// The low-rank product, which tiles and panels make with the product itself, where the latter goes by rows.
GemmCall low_call_of(const GemmCall& call) {
  GemmCall low{};
  low.job = low_job_of(call);
  return low;
}

bool is_empty(const GemmCall& call) { return call.job.m == 0 || call.job.width() == 0; }

TileProduct tile_product_of(const GemmCall& call) {
  const GemmJob& job = call.job;
  TileProduct product{};
  product.forward = job.forward;
  product.matrix = {job.dense == nullptr ? &job.weight : nullptr, static_cast<const Bf16*>(job.dense), job.n, job.k};
  product.x = static_cast<const Bf16*>(job.x);
  product.bias = static_cast<const Bf16*>(job.bias);
  product.low = static_cast<const Bf16*>(job.low);
  product.up = static_cast<const Bf16*>(job.up);
  product.r = job.r;
  product.y = static_cast<Bf16*>(job.y);
  product.m = job.m;
  product.down = static_cast<const Bf16*>(call.down);
  product.made_low = static_cast<Bf16*>(call.low);
  product.low_scale = call.low_scale;
  return product;
}

}  // namespace

int64_t linear_4bit_scratch_bytes(const GemmCall& call) {
  if (is_empty(call)) {
    return 0;
  }
  switch (path_of(call.job)) {
    case Path::kRows: {
      const int64_t low = call.down == nullptr ? 0 : linear_4bit_scratch_bytes(low_call_of(call));
      const bool reorders = kernels().reorder_tokens[index_of(call.job.dtype)] != nullptr;
      return std::max(low, reorders ? call.job.m * rounded_up(call.job.k, kStreamChunk) * 2 : 0);
    }
    case Path::kTiles:
      return tile_product_scratch_bytes(tile_product_of(call));
    case Path::kDenseRows:
      return 0;
    default:
      return gemm_scratch_bytes(call);
  }
}

void linear_4bit(const GemmCall& call, unsigned char* scratch) {
  if (is_empty(call)) {
    return;
  }
  const GemmJob& job = call.job;
  switch (path_of(call.job)) {
    case Path::kRows: {
      if (call.down != nullptr) {
        linear_4bit(low_call_of(call), scratch);
      }
      const auto kernel = kernels().linear_rows[index_of(job.dtype)];
      const auto reorder = kernels().reorder_tokens[index_of(job.dtype)];
      if (reorder != nullptr) {
        reorder(job, scratch);
      }
      const int64_t units = ceil_div(job.n, kStreamRows);
      const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, kStreamRows * job.k));
      parallel_for(units, grain, [&](int64_t begin, int64_t end) {
        kernel(job, kStreamRows * begin, std::min(kStreamRows * end, job.n), scratch);
      });
      return;
    }
    case Path::kDenseRows: {
      const auto kernel = kernels().dense_rows[index_of(job.dtype)];
      const DenseJob rows{job.x, job.dense, job.y, job.m, job.n, job.k};
      const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, 2 * job.k));
      parallel_for(ceil_div(job.n, 2), grain,
                   [&](int64_t begin, int64_t end) { kernel(rows, 2 * begin, std::min(2 * end, job.n)); });
      return;
    }
    case Path::kTiles:
      tile_product(tile_product_of(call), scratch);
      return;
    default:
      gemm(call, scratch);
  }
}

int64_t outer_scratch_bytes(Dtype dtype, int64_t m, int64_t r, int64_t width) {
  return takes_tiles(dtype) ? tile_outer_scratch_bytes(m, r) : gemm_outer_scratch_bytes(dtype, m, r, width);
}

void outer(Dtype dtype, const void* left, const void* right, int64_t m, int64_t r, int64_t width, float scale,
           float* out, unsigned char* scratch) {
  if (takes_tiles(dtype)) {
    tile_outer(static_cast<const Bf16*>(left), static_cast<const Bf16*>(right), m, r, width, scale, out, scratch);
  } else if (r > 0 && width > 0) {
    gemm_outer(dtype, left, right, m, r, width, scale, out, scratch);
  }
}

}  // namespace qlora_native::cpu
