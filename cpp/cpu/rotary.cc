#include "cpu/rotary.h"

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {

void rotary(const RotaryJob& job, Dtype dtype) {
  const auto kernel = kernels().activations.rotary_positions[static_cast<int>(dtype)];
  const int64_t width = std::max<int64_t>(1, job.heads * job.head_dim);
  parallel_for(job.batches * job.length, std::max<int64_t>(1, kActivationsPerTask / width),
               [&](int64_t first, int64_t last) { kernel(job, first, last); });
}

}  // namespace qlora_native::cpu
