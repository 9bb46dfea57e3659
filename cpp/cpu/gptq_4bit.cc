#include "cpu/gptq_4bit.h"

#include <algorithm>
#include <vector>

#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kBytesPerTask = 1 << 16;

// Columns of a tile stand together for each row of the factor, of which what lies below its diagonal is left out.
std::vector<float> tiled(const float* factor,  // [k, k]
                         int64_t k, int64_t columns) {
  const int64_t tiles = ceil_div(k, columns);
  std::vector<float> packed(static_cast<size_t>(feedback_offset(tiles * columns, columns)));
  parallel_for(tiles, ceil_div(kProductsPerTask, k * columns), [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * columns;
      const int64_t width = std::min(columns, k - begin);
      float* to = packed.data() + feedback_offset(begin, columns);
      for (int64_t i = 0; i < begin + width; ++i) {
        const float* from = factor + i * k + begin;
        std::copy(from, from + width, to + i * columns);
      }
    }
  });
  return packed;
}

}  // namespace

void gptq_4bit(const void* x, Dtype dtype, int64_t n, int64_t k, int64_t block_size, QuantType type,
               const float* factor, const int64_t* order, const float* scales, uint8_t* packed) {
  const CalibrationKernels& table = kernels().calibration;
  const int64_t numel = n * k;
  if (numel == 0) {
    return;
  }
  const std::vector<float> tiles = tiled(factor, k, table.feedback_columns);
  std::vector<uint8_t> codes(static_cast<size_t>(numel));
  const FeedbackJob job{x, n, k, block_size, type, tiles.data(), order, scales, codes.data()};
  const auto kernel = table.feedback_panels[static_cast<int>(dtype)];
  const int64_t products = table.feedback_rows * k * k / 2;
  parallel_for(ceil_div(n, table.feedback_rows), ceil_div(kProductsPerTask, products),
               [&](int64_t first, int64_t last) {
                 std::vector<float> errors(static_cast<size_t>(table.feedback_rows * k));
                 kernel(job, first, last, errors.data());
               });
  parallel_for(packed_bytes(numel), kBytesPerTask, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto even = static_cast<size_t>(2 * i);
      packed[i] = pack_nibbles(codes[even], even + 1 < codes.size() ? codes[even + 1] : zero_code(type));
    }
  });
}

}  // namespace qlora_native::cpu
