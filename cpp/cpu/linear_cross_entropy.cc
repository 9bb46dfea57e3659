#include "cpu/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {

void softmax_loss(Dtype dtype, void* logits, const int64_t* targets, int64_t rows, int64_t vocabulary,
                  bool need_gradient, float* losses) {
  const auto kernel = kernels().activations.softmax_row[static_cast<int>(dtype)];
  const int64_t row_bytes = vocabulary * (dtype == Dtype::kFloat32 ? 4 : 2);
  char* bytes = static_cast<char*>(logits);
  parallel_for(rows, std::max<int64_t>(1, kActivationsPerTask / vocabulary), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const SoftmaxRow result = kernel(bytes + row * row_bytes, vocabulary, targets[row], need_gradient);
      losses[row] = std::log(result.sum) + (result.top - result.chosen);
    }
  });
}

void few_logits(Dtype dtype, const void* h, const void* weight, int64_t tokens, int64_t vocabulary, int64_t width,
                void* logits) {
  const auto kernel = kernels().dense_rows[static_cast<int>(dtype)];
  const DenseJob job{h, weight, logits, tokens, vocabulary, width};
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / std::max<int64_t>(1, 2 * width));
  parallel_for((vocabulary + 1) / 2, grain,
               [&](int64_t first, int64_t last) { kernel(job, 2 * first, std::min(2 * last, vocabulary)); });
}

}  // namespace qlora_native::cpu
