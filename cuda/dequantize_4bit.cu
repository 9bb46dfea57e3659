#include <bit>
#include <cstdint>

#include "cuda/dequantize_4bit.cuh"
#include "cuda/dequantize_4bit.h"
#include "cuda/grid.h"

namespace qlora_native::cuda {
namespace {

template <typename T>
cudaError_t launch(const WeightView& weight, void* out, cudaStream_t stream) {
  return wp::launch(dequantize_4bit_kernel<T>, dim3(grid_blocks(weight.numel, kDequantizeChunk)),
                    dim3(kDequantizeThreads), 0, stream, weight,
                    std::countr_zero(static_cast<uint64_t>(weight.block_size)),
                    are_aligned(kVectorBytes, weight.packed, out), static_cast<T*>(out));
}

}  // namespace

cudaError_t launch_dequantize_4bit(const WeightView& weight, Dtype dtype, void* out, cudaStream_t stream) {
  if (weight.numel == 0) {
    return cudaSuccess;
  }
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<float>(weight, out, stream);
    case Dtype::kBfloat16:
      return launch<Bf16>(weight, out, stream);
    case Dtype::kFloat16:
      return launch<Fp16>(weight, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora_native::cuda
