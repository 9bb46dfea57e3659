#include "cpu/dequantize_4bit.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

// A longer output is written past the caches: they would not hold it, and a line that is not read before it is written
// costs half the traffic. A shorter one is better written into them, for its reader. The last-level cache as the system
// tells it, but no more than a machine shared with others gives: on a Xeon of 480 MB the turn came between 64 and 96
// MiB.
int64_t largest_cached_output() {
  constexpr int64_t kMost = 64 << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return reported > 0 ? std::min(reported, kMost) : kMost;
#else
  return kMost;
#endif
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace

void dequantize_4bit(const WeightView& weight, const Panel& panel, Dtype dtype, void* out) {
  const auto kernel = kernels().dequantize_span[static_cast<int>(dtype)];
  auto* bytes = static_cast<unsigned char*>(out);
  const int64_t width = panel.columns();
  const int64_t size = size_of(dtype);
  if (width == panel.row_length) {  // whole rows are one run of elements; cut it at blocks, not at rows
    const int64_t first = panel.row_begin * width;
    const int64_t total = panel.rows() * width;
    const bool stream = total * size > largest_cached_output();
    const int64_t units = (total + weight.block_size - 1) / weight.block_size;
    parallel_for(units, std::max<int64_t>(1, kElementsPerTask / weight.block_size), [&](int64_t begin, int64_t end) {
      const int64_t from = begin * weight.block_size;
      const int64_t to = std::min(end * weight.block_size, total);
      kernel(weight, first + from, first + to, bytes + from * size, stream);
    });
    return;
  }
  parallel_for(panel.rows(), std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t start = (panel.row_begin + row) * panel.row_length;
                   kernel(weight, start + panel.column_begin, start + panel.column_end, bytes + row * width * size,
                          false);
                 }
               });
}

void decode_scales(const WeightView& weight, int64_t blocks, float* scales) {
  parallel_for(blocks, kElementsPerTask,
               [&](int64_t begin, int64_t end) { kernels().decode_scales(weight, begin, end, scales + begin); });
}

}  // namespace qlora_native::cpu
