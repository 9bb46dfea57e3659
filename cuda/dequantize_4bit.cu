#include <bit>
#include <cstdint>

#include "cuda/dequantize_4bit.cuh"
#include "cuda/dequantize_4bit.h"
#include "cuda/grid.h"

namespace qlora_native::cuda {
namespace {

template <typename T>
cudaError_t launch(const WeightView& weight, int64_t first, int64_t end, void* out, cudaStream_t stream) {
  // The codes of a vector stay within bytes and blocks only from a multiple of them on.
  const bool vectors = first % kPerVector<T> == 0 && are_aligned(kVectorBytes, weight.packed + first / 2, out);
  return wp::launch(
      dequantize_4bit_kernel<T>, dim3(grid_blocks(end - first, kDequantizeChunk)), dim3(kDequantizeThreads), 0, stream,
      weight, std::countr_zero(static_cast<uint64_t>(weight.block_size)), vectors, first, end, static_cast<T*>(out));
}

}  // namespace

cudaError_t launch_dequantize_4bit(const WeightView& weight, Dtype dtype, void* out, cudaStream_t stream) {
  return launch_dequantize_4bit(weight, 0, weight.numel, dtype, out, stream);
}

cudaError_t launch_dequantize_4bit(const WeightView& weight, int64_t first, int64_t count, Dtype dtype, void* out,
                                   cudaStream_t stream) {
  if (count == 0) {
    return cudaSuccess;
  }
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<float>(weight, first, first + count, out, stream);
    case Dtype::kBfloat16:
      return launch<Bf16>(weight, first, first + count, out, stream);
    case Dtype::kFloat16:
      return launch<Fp16>(weight, first, first + count, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora_native::cuda
