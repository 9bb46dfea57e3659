#include "cpu/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/kernels.h"
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

}  // namespace qlora_native::cpu
