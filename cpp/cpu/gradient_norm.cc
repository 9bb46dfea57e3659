#include "cpu/gradient_norm.h"

#include <cmath>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

double gradient_norm(const OptimTensor* tensors, int64_t num_tensors) {
  const IeeeArithmetic ieee;
  std::vector<int64_t> start(static_cast<size_t>(num_tensors) + 1);  // of the tensor's chunks in `sums`
  for (int64_t i = 0; i < num_tensors; ++i) {
    start[static_cast<size_t>(i) + 1] = start[static_cast<size_t>(i)] + ceil_div(tensors[i].numel, kNormChunk);
  }
  std::vector<double> sums(static_cast<size_t>(start.back()));
  const OptimKernels& table = kernels().optim;
  const std::vector<StatePart> parts = whole_parts(tensors, num_tensors);
  for_blocks_of_parts(parts.data(), num_tensors, kNormChunk, 1, [&](int64_t i, int64_t first, int64_t last) {
    const OptimTensor& tensor = tensors[i];
    const auto kernel = table.sum_of_squares[static_cast<int>(tensor.dtype)];
    const int64_t element_bytes = tensor.dtype == Dtype::kFloat32 ? 4 : 2;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t at = chunk * kNormChunk;
      sums[static_cast<size_t>(start[static_cast<size_t>(i)] + chunk)] =
          kernel(static_cast<const char*>(tensor.grad) + at * element_bytes, std::min(kNormChunk, tensor.numel - at));
    }
  });
  double slot[static_cast<size_t>(kNormLanes)] = {};
  for (size_t i = 0; i < sums.size(); ++i) {
    slot[i % static_cast<size_t>(kNormLanes)] += sums[i];
  }
  return std::sqrt(sum_by_halves(slot));
}

}  // namespace qlora_native::cpu
