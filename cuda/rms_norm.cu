#include <limits>

#include "cuda/elementwise.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rms_norm.h"

namespace qlora_native::cuda {
namespace {

// Enough that a multiprocessor has rows on their way while others are summed; few enough that a block has many rows.
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int64_t kVectorsPerThread = 2;  // of the rows that a block takes at a time

template <typename T, typename Rule>
cudaError_t launch(const Arrays<const T*, Rule::kInputs>& in, const T* weight, int64_t rows, int64_t width, Rule rule,
                   T* out, cudaStream_t stream) {
  int device = 0;
  int multiprocessors = 0;
  int most_shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess || rows == 0) {
    return error;
  }
  if (width > std::numeric_limits<int>::max() / 2) {
    return cudaErrorInvalidValue;
  }
  bool staged = are_aligned(kVectorBytes, weight, out) && width % kPerVector<T> == 0;
  for (const T* input : in.at) {
    staged = staged && are_aligned(kVectorBytes, input);
  }
  constexpr int64_t kFactorBytes = kMostRows * sizeof(RowFactors);
  const auto row_bytes = width * static_cast<int64_t>(sizeof(T));
  const auto shared_bytes = [&](int at_a_time) { return kFactorBytes + (1 + Rule::kInputs * at_a_time) * row_bytes; };
  int at_a_time = kMostRows;
  while (at_a_time > 1 && (at_a_time * row_bytes > kVectorsPerThread * kRowThreads * kVectorBytes ||
                           shared_bytes(at_a_time) > most_shared)) {
    at_a_time /= 2;
  }
  staged = staged && shared_bytes(at_a_time) <= most_shared;
  return wp::launch(staged ? row_kernel<T, true, Rule> : row_kernel<T, false, Rule>,
                    dim3(grid_blocks(rows, at_a_time, int64_t{kBlocksPerMultiprocessor} * multiprocessors)),
                    dim3(kRowThreads), static_cast<size_t>(staged ? shared_bytes(at_a_time) : kFactorBytes), stream, in,
                    weight, rows, static_cast<int>(width), kRowThreads / at_a_time, rule, out);
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormJob& job, int64_t rows, Dtype dtype, cudaStream_t stream) {
  return launch_for(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch<T>({static_cast<const T*>(job.x)}, static_cast<const T*>(job.weight), rows, job.width,
                     RmsNorm{job.eps, job.rstd}, static_cast<T*>(job.y), stream);
  });
}

cudaError_t launch_rms_norm_backward(const RmsNormGradJob& job, int64_t rows, Dtype dtype, cudaStream_t stream) {
  return launch_for(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch<T>({static_cast<const T*>(job.x), static_cast<const T*>(job.grad_y)},
                     static_cast<const T*>(job.weight), rows, job.width, RmsNormGrad{job.rstd},
                     static_cast<T*>(job.grad_x), stream);
  });
}

}  // namespace qlora_native::cuda
