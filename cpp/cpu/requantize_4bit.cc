#include "cpu/requantize_4bit.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {

void requantize_4bit(const RequantizeJob& job) {
  const int64_t units = job.goes_by_rows() ? job.n : packed_bytes(job.weight.numel);
  const int64_t products = (job.r + 1) * (job.goes_by_rows() ? job.k : 2);
  parallel_for(units, std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, products)),
               [&](int64_t first, int64_t last) { kernels().requantize(job, first, last); });
}

}  // namespace qlora_native::cpu
