#include "cpu/quantize_4bit.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "core/arithmetic.h"
#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

float fixed_order_mean(const float* values, int64_t count) {
  const int64_t groups = num_nested_blocks(count);
  std::vector<double> sums(static_cast<size_t>(groups));
  parallel_for(groups, 64,
               [&](int64_t begin, int64_t end) { kernels().sum_groups(values, count, begin, end, sums.data()); });
  double total = 0.0;
  for (const double sum : sums) {
    total += sum;
  }
  return static_cast<float>(total / static_cast<double>(count));
}

}  // namespace

int64_t quantize_4bit(const void* x, Dtype dtype, int64_t numel, int64_t block_size, QuantType type, uint8_t* packed,
                      float* absmax) {
  const BlockJob job{x, numel, block_size, type, packed, absmax};
  const auto kernel = kernels().quantize_blocks[static_cast<int>(dtype)];
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> bad{kNone};
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / block_size);
  parallel_for(num_blocks(numel, block_size), grain, [&](int64_t begin, int64_t end) {
    const int64_t found = kernel(job, begin, end);
    int64_t lowest = bad.load();
    while (found >= 0 && found < lowest && !bad.compare_exchange_weak(lowest, found)) {
    }
  });
  return bad == kNone ? -1 : bad.load();
}

void quantize_scales(const float* absmax, int64_t blocks, uint8_t* codes, float* nested_absmax, float* nested_offset) {
  if (blocks == 0) {
    *nested_offset = 0.0f;
    return;
  }
  const IeeeArithmetic ieee;  // the mean is rounded on this thread
  const float offset = fixed_order_mean(absmax, blocks);
  *nested_offset = offset;
  const ScaleJob job{absmax, blocks, offset, codes, nested_absmax};
  parallel_for(num_nested_blocks(blocks), 16,
               [&](int64_t begin, int64_t end) { kernels().quantize_scale_groups(job, begin, end); });
}

}  // namespace qlora_native::cpu
