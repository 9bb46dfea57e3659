#include "cpu/linear_4bit.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/tiles.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kFewDenseRows = 8;  // of x, whose products with a dense W are limited by its bytes

// How a product is computed. Bias and adapter are added in the sums, in fp32, which are rounded once.
enum class Path {
  kRows,       // a few tokens, row after row of W: kernels/rows-inl.h, streams-inl.h
  kDenseRows,  // the same of a dense W
  kTiles,      // bf16 in the matrix units of AMX: kernels/tiles.cc, gemm-amx-inl.h
  kGemm        // blocks of W that are decoded into a cache: kernels/gemm-inl.h, for bf16 also gemm-bf16dot-inl.h
};

int64_t index_of(Dtype dtype) { return static_cast<int64_t>(dtype); }

bool takes_tiles(Dtype dtype) { return dtype == Dtype::kBfloat16 && have_tiles(); }

Path path_of(const GemmCall& call) {
  const GemmJob& job = call.job;
  const bool plain = job.bias == nullptr && job.scale == 1.0f && job.down == nullptr;
  if (job.forward && job.dense == nullptr && job.m <= few_rows(job.dtype) && (job.r == 0 || call.as_stored)) {
    return Path::kRows;
  }
  if (job.forward && job.dense != nullptr && job.m <= kFewDenseRows && plain) {
    return Path::kDenseRows;
  }
  const int64_t depth = job.forward ? job.k : job.n;  // tiles write nothing where there is none, not even the bias
  return takes_tiles(job.dtype) && job.scale == 1.0f && depth > 0 ? Path::kTiles : Path::kGemm;
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
  product.down = static_cast<const Bf16*>(job.down);
  product.made_low = static_cast<Bf16*>(job.made_low);
  product.down_scale = job.down_scale;
  return product;
}

// y = x w^T for a few tokens, a pair of rows of w after another.
void dense_rows(Kernels::DenseRows kernel, const DenseJob& job) {
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, 2 * job.m * job.k));
  parallel_for(ceil_div(job.n, 2), grain,
               [&](int64_t begin, int64_t end) { kernel(job, 2 * begin, std::min(2 * end, job.n)); });
}

// y for few tokens, and the adapter's projection of them before.
void product_by_rows(const GemmCall& call, unsigned char* scratch) {
  const GemmJob& job = call.job;
  const RowKernels& rows = kernels().rows[index_of(job.dtype)];
  rows.reorder(job, scratch);
  if (job.r > 0) {
    dense_rows(kernels().fp32_rows[index_of(job.dtype)], {job.x, job.down, job.made_low, job.m, job.r, job.k});
  }
  const RowsJob rows_job{job, static_cast<const float*>(job.up), call.up_scale, scratch};
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, kStreamRows * job.k));
  parallel_for(ceil_div(job.n, kStreamRows), grain, [&](int64_t begin, int64_t end) {
    rows.product(rows_job, kStreamRows * begin, std::min(kStreamRows * end, job.n));
  });
}

}  // namespace

int64_t few_rows(Dtype dtype) {
  return takes_tiles(dtype) ? kFewTileRows : kernels().rows[index_of(dtype)].most_tokens;
}

int64_t linear_4bit_scratch_bytes(const GemmCall& call) {
  if (is_empty(call)) {
    return 0;
  }
  switch (path_of(call)) {
    case Path::kRows:
      return kernels().rows[index_of(call.job.dtype)].scratch_bytes(call.job);
    case Path::kTiles:
      return tile_product_scratch_bytes(tile_product_of(call));
    case Path::kDenseRows:
      return 0;
    default:
      return gemm_scratch_bytes(call.job);
  }
}

void linear_4bit(const GemmCall& call, unsigned char* scratch) {
  if (is_empty(call)) {
    return;
  }
  const GemmJob& job = call.job;
  switch (path_of(call)) {
    case Path::kRows:
      product_by_rows(call, scratch);
      return;
    case Path::kDenseRows:
      dense_rows(kernels().dense_rows[index_of(job.dtype)], {job.x, job.dense, job.y, job.m, job.n, job.k});
      return;
    case Path::kTiles:
      tile_product(tile_product_of(call), scratch);
      return;
    default:
      gemm(job, scratch);
  }
}

int64_t part_scratch_bytes(const GemmCall& call, int64_t columns) {
  switch (path_of(call)) {
    case Path::kRows:
      return kernels().rows[index_of(call.job.dtype)].scratch_bytes(call.job);
    case Path::kTiles: {
      TileProduct product = tile_product_of(call);
      const int64_t bytes = tile_part_scratch_bytes(product, 0);
      product.down = nullptr;
      return std::max(bytes, tile_part_scratch_bytes(product, columns));
    }
    default:
      return gemm_part_bytes(call.job, columns);
  }
}

void project_part(const GemmCall& call, unsigned char* scratch) {
  const GemmJob& job = call.job;
  switch (path_of(call)) {
    case Path::kRows:
      kernels().fp32_rows[index_of(job.dtype)]({job.x, job.down, job.made_low, job.m, job.r, job.k}, 0, job.r);
      return;
    case Path::kTiles:
      tile_part(tile_product_of(call), 0, 0, scratch);
      return;
    default:
      gemm_low(job, scratch);
  }
}

void linear_4bit_part(const GemmCall& call, int64_t first, int64_t last, unsigned char* scratch) {
  const GemmJob& job = call.job;
  switch (path_of(call)) {
    case Path::kRows: {
      const RowKernels& rows = kernels().rows[index_of(job.dtype)];
      rows.reorder(job, scratch);
      rows.product({job, static_cast<const float*>(job.up), call.up_scale, scratch}, first, last);
      return;
    }
    case Path::kTiles: {
      TileProduct product = tile_product_of(call);
      product.down = nullptr;
      tile_part(product, first, last, scratch);
      return;
    }
    default:
      gemm_part(job, first, last, scratch);
  }
}

int64_t outer_part_scratch_bytes(Dtype dtype, const OuterJob& job, int64_t columns) {
  return takes_tiles(dtype) ? tile_outer_scratch_bytes(job.m, job.r)
                            : kernels().gemm[index_of(dtype)].outer_bytes(columns);
}

void outer_part(Dtype dtype, const OuterJob& job, int64_t first, int64_t last, unsigned char* scratch) {
  if (takes_tiles(dtype)) {
    tile_outer_part(static_cast<const Bf16*>(job.left), static_cast<const Bf16*>(job.right), job.m, job.r, job.width,
                    job.scale, first, last, job.out, scratch);
  } else {
    kernels().gemm[index_of(dtype)].outer(job, first, last, scratch);
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
    gemm_outer(dtype, {left, right, m, r, width, scale, out}, scratch);
  }
}

}  // namespace qlora_native::cpu
