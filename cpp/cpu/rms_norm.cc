#include "cpu/rms_norm.h"

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, kActivationsPerTask / std::max<int64_t>(1, width)); }

}  // namespace

void rms_norm(const RmsNormJob& job, int64_t rows, Dtype dtype) {
  const auto kernel = kernels().activations.rms_norm_rows[static_cast<int>(dtype)];
  parallel_for(rows, rows_per_task(job.width), [&](int64_t first, int64_t last) { kernel(job, first, last); });
}

void rms_norm_backward(const RmsNormGradJob& job, int64_t rows, Dtype dtype) {
  const auto kernel = kernels().activations.rms_norm_grad_rows[static_cast<int>(dtype)];
  parallel_for(rows, rows_per_task(job.width), [&](int64_t first, int64_t last) { kernel(job, first, last); });
}

}  // namespace qlora_native::cpu
