#include "cpu/search_scales_4bit.h"

#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {

void search_scales_4bit(const SearchJob& job, Dtype dtype) {
  const auto kernel = kernels().calibration.search_blocks[static_cast<int>(dtype)];
  parallel_for(num_blocks(job.numel, job.block_size), ceil_div(kProductsPerTask, job.block_size * job.count),
               [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

}  // namespace qlora_native::cpu
