#include "cpu/gemm.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kUnitRows = 512;      // at most: their packed form in a span stays in the second cache
constexpr int64_t kUnitColumns = 1024;  // at most, so that a thread takes several units of a large product
constexpr int64_t kLeastRows = 48;      // below which decoding takes a fifth of a unit's time

int64_t item_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

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

template <typename Word>
void transpose_words(const Word* left, int64_t m, int64_t r, Word* out) {
  parallel_for(m, 256, [&](int64_t first, int64_t last) {
    for (int64_t row = 0; row < r; ++row) {
      for (int64_t i = first; i < last; ++i) {
        out[row * m + i] = left[i * r + row];
      }
    }
  });
}

GemmCall outer_call(Dtype dtype, const void* left, const void* right, int64_t m, int64_t r, int64_t width, float scale,
                    float* out) {
  GemmCall call{};
  call.job.dtype = dtype;
  call.job.x = left;  // [r, m]
  call.job.m = r;
  call.job.n = m;
  call.job.k = width;
  call.job.dense = right;
  call.job.scale = scale;
  call.job.fp32_y = true;
  call.job.y = out;
  return call;
}

int64_t transposed_bytes(Dtype dtype, int64_t m, int64_t r) { return rounded_up(m * r * item_bytes(dtype), 64); }

}  // namespace

GemmJob low_job_of(const GemmCall& call) {
  GemmJob job{};
  job.dtype = call.job.dtype;
  job.forward = call.job.forward;
  job.x = call.job.x;
  job.m = call.job.m;
  job.n = call.job.forward ? call.job.r : call.job.n;
  job.k = call.job.forward ? call.job.k : call.job.r;
  job.dense = call.down;
  job.scale = call.low_scale;
  job.y = call.low;
  return job;
}

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

int64_t gemm_scratch_bytes(const GemmCall& call) {
  return std::max(scratch_bytes(call.job), call.down == nullptr ? 0 : scratch_bytes(low_job_of(call)));
}

void gemm(const GemmCall& call, unsigned char* scratch) {
  if (call.down != nullptr) {
    multiply(low_job_of(call), scratch);
  }
  multiply(call.job, scratch);
}

int64_t gemm_outer_scratch_bytes(Dtype dtype, int64_t m, int64_t r, int64_t width) {
  return transposed_bytes(dtype, m, r) +
         gemm_scratch_bytes(outer_call(dtype, nullptr, nullptr, m, r, width, 1.0f, nullptr));
}

void gemm_outer(Dtype dtype, const void* left, const void* right, int64_t m, int64_t r, int64_t width, float scale,
                float* out, unsigned char* scratch) {
  if (dtype == Dtype::kFloat32) {
    transpose_words(static_cast<const float*>(left), m, r, reinterpret_cast<float*>(scratch));
  } else {
    transpose_words(static_cast<const uint16_t*>(left), m, r, reinterpret_cast<uint16_t*>(scratch));
  }
  gemm(outer_call(dtype, scratch, right, m, r, width, scale, out), scratch + transposed_bytes(dtype, m, r));
}

}  // namespace qlora_native::cpu
