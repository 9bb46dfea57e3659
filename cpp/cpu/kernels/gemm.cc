#include "cpu/kernels/gemm.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kUnitRows = 512;      // at most: their packed form in a span stays in the second cache
constexpr int64_t kUnitColumns = 1024;  // at most, so that a thread takes several units of a large product
constexpr int64_t kOuterGrain = 32;     // columns of an outer product
constexpr int64_t kLowShare = 24;       // columns of y for each of the adapter's, where units compute those twice
constexpr int64_t kLeastRows = 48;      // below which decoding takes a fifth of a unit's time

const GemmKernels& kernels_of(const GemmJob& job) { return kernels().gemm[static_cast<int>(job.dtype)]; }

int64_t units_bytes(const GemmJob& job, const GemmPlan& plan) {
  const int64_t rows = ceil_div(job.m, plan.row_cuts);
  return unit_threads(plan.units()) * kernels_of(job).unit_bytes(job, rows, plan.columns);
}

int64_t scratch_bytes(const GemmJob& job) {
  return units_bytes(job, plan_gemm(job.m, job.width(), available_threads()));
}

void multiply(const GemmJob& job, unsigned char* scratch) {
  const GemmKernels& table = kernels_of(job);
  const GemmPlan plan = plan_gemm(job.m, job.width(), available_threads());
  const int64_t bytes = units_bytes(job, plan) / unit_threads(plan.units());
  parallel_units(plan.units(), [&](int64_t index, int64_t thread) {
    table.product(job, plan.unit(index, job.m, job.width()), scratch + thread * bytes);
  });
}

// The adapter's projection as a product of its own.
GemmJob low_job_of(const GemmJob& job) {
  GemmJob low{};
  low.dtype = job.dtype;
  low.forward = job.forward;
  low.x = job.x;
  low.m = job.m;
  low.n = job.forward ? job.r : job.n;
  low.k = job.forward ? job.k : job.r;
  low.dense = job.down;
  low.scale = job.down_scale;
  low.y = job.made_low;
  return low;
}

GemmJob without_down(GemmJob job) {
  job.down = nullptr;
  return job;
}

// Whether the projection is computed in the units, from the rows that they pack anyway: each unit of the same rows does
// it again.
bool makes_low(const GemmJob& job) {
  const GemmPlan plan = plan_gemm(job.m, job.width(), available_threads());
  return kernels_of(job).makes_low(job) && (plan.column_cuts == 1 || kLowShare * job.r <= plan.columns);
}

// Columns that a thread takes: long pieces of a row, so that memory is read along it.
int64_t outer_columns(int64_t m, int64_t r, int64_t width) {
  const int64_t least = ceil_div(kProductsPerTask, std::max<int64_t>(1, m * r));
  const int64_t fair = std::clamp(ceil_div(width, available_threads()), least, std::max(least, kUnitColumns));
  return rounded_up(fair, kOuterGrain);
}

}  // namespace

GemmUnit GemmPlan::unit(int64_t index, int64_t m, int64_t width) const {
  const int64_t cut = index / column_cuts;
  const int64_t column = index % column_cuts * columns;
  return {m * cut / row_cuts, m * (cut + 1) / row_cuts, column, std::min(column + columns, width)};
}

GemmPlan plan_gemm(int64_t m, int64_t width, int64_t threads) {
  GemmPlan best{};
  // The time of the thread that ends last, in rows by columns. Of plans within 1/32 of each other the earlier one is
  // taken, which decodes and packs less often.
  int64_t least = 0;
  const int64_t first_column_cuts = std::max<int64_t>(1, ceil_div(width, kUnitColumns));
  const int64_t last_column_cuts = std::max<int64_t>(1, ceil_div(width, kColumnGrain));
  const int64_t first_row_cuts = std::max<int64_t>(1, ceil_div(m, kUnitRows));
  for (int64_t row_cuts = first_row_cuts; row_cuts <= std::max(first_row_cuts, m / kLeastRows); ++row_cuts) {
    for (int64_t cuts = first_column_cuts; cuts <= last_column_cuts; ++cuts) {
      const int64_t columns = std::max(kColumnGrain, rounded_up(ceil_div(width, cuts), kColumnGrain));
      const int64_t column_cuts = std::max<int64_t>(1, ceil_div(width, columns));
      const int64_t turns = ceil_div(row_cuts * column_cuts, threads);  // of the thread with the most units
      const int64_t time = turns * (ceil_div(m, row_cuts) + kDecodeRows) * (columns + kPackColumns);
      if (best.columns == 0 || time + time / 32 < least) {
        best = {row_cuts, columns, column_cuts};
        least = time;
      }
    }
  }
  return best;
}

int64_t gemm_scratch_bytes(const GemmJob& job) {
  return job.down == nullptr || makes_low(job)
             ? scratch_bytes(job)
             : std::max(scratch_bytes(without_down(job)), scratch_bytes(low_job_of(job)));
}

void gemm(const GemmJob& job, unsigned char* scratch) {
  if (job.down == nullptr || makes_low(job)) {
    multiply(job, scratch);
    return;
  }
  multiply(low_job_of(job), scratch);
  multiply(without_down(job), scratch);
}

int64_t gemm_part_bytes(const GemmJob& job, int64_t columns) {
  const int64_t rows = std::min(job.m, kUnitRows);
  const int64_t bytes = kernels_of(job).unit_bytes(without_down(job), rows, rounded_up(columns, kColumnGrain));
  return job.down == nullptr
             ? bytes
             : std::max(bytes, kernels_of(job).unit_bytes(low_job_of(job), rows, rounded_up(job.r, kColumnGrain)));
}

void gemm_low(const GemmJob& job, unsigned char* scratch) { gemm_part(low_job_of(job), 0, job.r, scratch); }

void gemm_part(GemmJob job, int64_t first, int64_t last, unsigned char* scratch) {
  job.down = nullptr;
  for (int64_t row = 0; row < job.m; row += kUnitRows) {
    kernels_of(job).product(job, {row, std::min(row + kUnitRows, job.m), first, last}, scratch);
  }
}

int64_t gemm_outer_scratch_bytes(Dtype dtype, int64_t m, int64_t r, int64_t width) {
  const int64_t columns = outer_columns(m, r, width);
  return unit_threads(ceil_div(width, columns)) * kernels().gemm[static_cast<int>(dtype)].outer_bytes(columns);
}

void gemm_outer(Dtype dtype, const OuterJob& job, unsigned char* scratch) {
  if (job.m == 0) {
    std::fill_n(job.out, job.r * job.width, 0.0f);
    return;
  }
  const GemmKernels& table = kernels().gemm[static_cast<int>(dtype)];
  const int64_t columns = outer_columns(job.m, job.r, job.width);
  const int64_t bytes = table.outer_bytes(columns);
  parallel_units(ceil_div(job.width, columns), [&](int64_t unit, int64_t thread) {
    const int64_t first = unit * columns;
    table.outer(job, first, std::min(first + columns, job.width), scratch + thread * bytes);
  });
}

}  // namespace qlora_native::cpu
