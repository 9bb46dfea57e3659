#include "cpu/linear_4bit.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kAlignment = 64;

enum class Path { kRows, kTiles, kColumns };

int64_t index_of(Dtype dtype) { return static_cast<int64_t>(dtype); }

Path path_of(const LinearCall& call) {
  if (call.job.forward && call.job.m <= few_rows(call.job.dtype) && (call.job.r == 0 || call.as_stored)) {
    return Path::kRows;
  }
  return low_rank_is_native(call.job.dtype) ? Path::kTiles : Path::kColumns;
}

bool is_empty(const LinearCall& call) { return call.job.m == 0 || call.job.width() == 0; }

TileProduct tile_product_of(const LinearCall& call) {
  const ProductJob& job = call.job;
  TileProduct product{};
  product.forward = job.forward;
  product.matrix = {&job.weight, nullptr, job.n, job.k};
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

// Units of columns that the vector kernels are dealt, and how many a thread gets at most.
int64_t column_units(const LinearCall& call) { return ceil_div(call.job.width(), kColumnGrain); }
int64_t column_share(const LinearCall& call) {
  return ceil_div(column_units(call), std::max<int64_t>(1, std::min(available_threads(), column_units(call))));
}
int64_t share_bytes(const LinearCall& call) {
  const int64_t bytes = kernels().columns_scratch_bytes(call.job, column_share(call) * kColumnGrain);
  return ceil_div(bytes, kAlignment) * kAlignment;
}

// Columns [first, last) of y for few tokens, and the adapter's projection of them before.
void product_by_rows(const LinearCall& call, unsigned char* scratch) {
  const ProductJob& job = call.job;
  const RowKernels& rows = kernels().rows[index_of(job.dtype)];
  rows.reorder(job, scratch);
  if (job.r > 0) {
    const DenseJob thin{job.x, call.down, call.low, job.m, job.r, job.k};
    const auto kernel = kernels().fp32_rows[index_of(job.dtype)];
    const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, 2 * job.m * job.k));
    parallel_for(ceil_div(job.r, 2), grain,
                 [&](int64_t begin, int64_t end) { kernel(thin, 2 * begin, std::min(2 * end, job.r)); });
  }
  const RowsJob rows_job{job, static_cast<const float*>(job.up), call.up_scale, scratch};
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, kStreamRows * job.k));
  parallel_for(ceil_div(job.n, kStreamRows), grain, [&](int64_t begin, int64_t end) {
    rows.product(rows_job, kStreamRows * begin, std::min(kStreamRows * end, job.n));
  });
}

}  // namespace

bool low_rank_is_native(Dtype dtype) { return dtype == Dtype::kBfloat16 && have_tiles(); }

int64_t few_rows(Dtype dtype) {
  return low_rank_is_native(dtype) ? kFewTileRows : kernels().rows[index_of(dtype)].most_tokens;
}

int64_t linear_4bit_scratch_bytes(const LinearCall& call) {
  if (is_empty(call)) {
    return 0;
  }
  switch (path_of(call)) {
    case Path::kRows:
      return kernels().rows[index_of(call.job.dtype)].scratch_bytes(call.job);
    case Path::kTiles:
      return tile_product_scratch_bytes(tile_product_of(call));
    default:
      return share_bytes(call) * ceil_div(column_units(call), std::max<int64_t>(1, column_share(call)));
  }
}

void linear_4bit(const LinearCall& call, unsigned char* scratch) {
  if (is_empty(call)) {
    return;
  }
  const ProductJob& job = call.job;
  switch (path_of(call)) {
    case Path::kRows:
      product_by_rows(call, scratch);
      return;
    case Path::kTiles:
      tile_product(tile_product_of(call), scratch);
      return;
    default: {
      const auto& columns = job.forward ? kernels().forward_columns : kernels().grad_input_columns;
      const auto kernel = columns[index_of(job.dtype)];
      const int64_t units = column_units(call);
      const int64_t share = column_share(call);
      const int64_t bytes = share_bytes(call);
      parallel_for(ceil_div(units, share), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          kernel(job, i * share * kColumnGrain, std::min((i + 1) * share * kColumnGrain, job.width()),
                 scratch + i * bytes);
        }
      });
    }
  }
}

int64_t outer_scratch_bytes(int64_t m, int64_t r) { return tile_outer_scratch_bytes(m, r); }

void outer(const void* left, const void* right, int64_t m, int64_t r, int64_t width, float scale, float* out,
           unsigned char* scratch) {
  tile_outer(static_cast<const Bf16*>(left), static_cast<const Bf16*>(right), m, r, width, scale, out, scratch);
}

}  // namespace qlora_native::cpu
