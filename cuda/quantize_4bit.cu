#include <bit>

#include "cuda/grid.h"
#include "cuda/quantize_4bit.cuh"
#include "cuda/quantize_4bit.h"

namespace qlora_native::cuda {
namespace {

template <typename T>
cudaError_t launch(const void* x, int64_t numel, int64_t block_size, QuantType type, uint8_t* packed, float* absmax,
                   unsigned long long* first_bad, cudaStream_t stream) {
  const auto kernel =
      type == QuantType::kNf4 ? quantize_4bit_kernel<T, QuantType::kNf4> : quantize_4bit_kernel<T, QuantType::kFp4>;
  return wp::launch(kernel, dim3(grid_blocks(numel, kQuantizeChunk)), dim3(kQuantizeThreads), 0, stream,
                    static_cast<const T*>(x), numel, std::countr_zero(static_cast<uint64_t>(block_size)),
                    are_aligned(kVectorBytes, x, packed), packed, absmax, first_bad);
}

}  // namespace

cudaError_t launch_quantize_4bit(const void* x, Dtype dtype, int64_t numel, int64_t block_size, QuantType type,
                                 uint8_t* packed, float* absmax, int64_t* first_bad, cudaStream_t stream) {
  // All ones: -1 as it is read, the highest number where the kernel takes minima.
  const cudaError_t error = cudaMemsetAsync(first_bad, 0xff, sizeof *first_bad, stream);
  if (error != cudaSuccess || numel == 0) {
    return error;
  }
  auto* lowest = reinterpret_cast<unsigned long long*>(first_bad);
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<float>(x, numel, block_size, type, packed, absmax, lowest, stream);
    case Dtype::kBfloat16:
      return launch<Bf16>(x, numel, block_size, type, packed, absmax, lowest, stream);
    case Dtype::kFloat16:
      return launch<Fp16>(x, numel, block_size, type, packed, absmax, lowest, stream);
  }
  return cudaErrorInvalidValue;
}

int64_t quantize_scales_workspace(int64_t blocks) {
  return num_nested_blocks(blocks) * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_quantize_scales(const float* absmax, int64_t blocks, uint8_t* codes, float* nested_absmax,
                                   float* nested_offset, void* workspace, cudaStream_t stream) {
  if (blocks == 0) {
    return cudaMemsetAsync(nested_offset, 0, sizeof *nested_offset, stream);
  }
  const int64_t groups = num_nested_blocks(blocks);
  auto* sums = static_cast<double*>(workspace);
  cudaError_t error = wp::launch(sum_groups_kernel<kWarpsOfSums>, dim3(grid_blocks(groups, kWarpsOfSums)),
                                 dim3(32 * kWarpsOfSums), 0, stream, absmax, blocks, groups, sums);
  if (error == cudaSuccess) {
    error = wp::launch(mean_kernel<kNestedThreads>, dim3(1), dim3(kNestedThreads), 0, stream, sums, groups, blocks,
                       nested_offset);
  }
  if (error == cudaSuccess) {
    error = wp::launch(quantize_scales_kernel<kNestedThreads>, dim3(grid_blocks(groups, 1)), dim3(kNestedThreads), 0,
                       stream, absmax, blocks, groups, nested_offset, codes, nested_absmax);
  }
  return error;
}

}  // namespace qlora_native::cuda
