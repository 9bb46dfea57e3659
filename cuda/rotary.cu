#include "cuda/elementwise.cuh"
#include "cuda/rotary.cuh"
#include "cuda/rotary.h"

namespace qlora_native::cuda {
namespace {

template <typename T>
cudaError_t launch(const RotaryJob& job, cudaStream_t stream) {
  const int64_t half = job.head_dim / 2;
  bool vectors = are_aligned(kVectorBytes, job.x, job.cosine, job.sine, job.y) && half % kPerVector<T> == 0;
  for (int i = 0; i < 3; ++i) {
    vectors = vectors && job.x_strides[i] % kPerVector<T> == 0 && job.y_strides[i] % kPerVector<T> == 0;
  }
  const auto wide = static_cast<unsigned>(at_most(half / (vectors ? kPerVector<T> : 1), kRotaryThreads));
  const unsigned high = kRotaryThreads / wide;
  const dim3 grid(grid_blocks(job.batches * job.length, high), grid_blocks(job.heads, kRotaryHeads));
  return wp::launch(vectors ? rotary_kernel<T, kPerVector<T>> : rotary_kernel<T, 1>, grid, dim3(wide, high), 0, stream,
                    job);
}

}  // namespace

cudaError_t launch_rotary(const RotaryJob& job, Dtype dtype, cudaStream_t stream) {
  if (job.batches * job.heads * job.length == 0) {
    return cudaSuccess;
  }
  return launch_for(dtype, [&](auto zero) { return launch<decltype(zero)>(job, stream); });
}

}  // namespace qlora_native::cuda
