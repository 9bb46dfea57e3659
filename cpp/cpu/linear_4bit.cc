#include "cpu/linear_4bit.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kProductsPerTask = 1 << 15;

}  // namespace

int64_t linear_4bit_max_tokens() { return kMaxTokens; }

void linear_4bit(const WeightView& weight, Dtype dtype, const void* x, const void* bias, int64_t m, int64_t n,
                 int64_t k, void* y) {
  const LinearJob job{weight, x, bias, y, m, n, k};
  const auto kernel = kernels().linear_rows[static_cast<int>(dtype)];
  const int64_t pairs = (n + 1) / 2;  // a pair of rows shares its loads of x
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, 2 * k));
  parallel_for(pairs, grain, [&](int64_t begin, int64_t end) { kernel(job, 2 * begin, std::min(2 * end, n)); });
}

}  // namespace qlora_native::cpu
