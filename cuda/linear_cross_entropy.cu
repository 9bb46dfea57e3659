#include "cuda/grid.h"
#include "cuda/linear_cross_entropy.cuh"
#include "cuda/linear_cross_entropy.h"

namespace qlora_native::cuda {
namespace {

template <typename T>
cudaError_t launch(void* logits, const int64_t* targets, int64_t ignore_index, int64_t rows, int64_t vocabulary,
                   bool need_gradient, float* losses, cudaStream_t stream) {
  const bool vectors = are_aligned(kVectorBytes, logits) && vocabulary % kPerVector<T> == 0;
  return wp::launch(softmax_loss_kernel<T, kSoftmaxThreads>, dim3(grid_blocks(rows, 1)), dim3(kSoftmaxThreads), 0,
                    stream, static_cast<T*>(logits), targets, ignore_index, rows, vocabulary, vectors, need_gradient,
                    losses);
}

}  // namespace

cudaError_t launch_softmax_loss(Dtype dtype, void* logits, const int64_t* targets, int64_t ignore_index, int64_t rows,
                                int64_t vocabulary, bool need_gradient, float* losses, cudaStream_t stream) {
  if (rows == 0) {
    return cudaSuccess;
  }
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<float>(logits, targets, ignore_index, rows, vocabulary, need_gradient, losses, stream);
    case Dtype::kBfloat16:
      return launch<Bf16>(logits, targets, ignore_index, rows, vocabulary, need_gradient, losses, stream);
    case Dtype::kFloat16:
      return launch<Fp16>(logits, targets, ignore_index, rows, vocabulary, need_gradient, losses, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora_native::cuda
