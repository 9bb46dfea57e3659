#include <bit>
#include <cstdint>
#include <limits>

#include "core/layout.h"
#include "cuda/dequantize_4bit.cuh"
#include "cuda/dequantize_4bit.h"

namespace qlora_native::cuda {
namespace {

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kVector == 0; }

template <typename T>
cudaError_t launch(const WeightView& weight, void* out, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // of gridDim.x; the kernel strides past them
  const int64_t wanted = ceil_div(ceil_div(weight.numel, kRun), kThreads);
  const dim3 grid(static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks));
  const int block_shift = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  const bool aligned = is_aligned(weight.packed) && is_aligned(out);
  const auto kernel = aligned ? dequantize_4bit_kernel<T, true> : dequantize_4bit_kernel<T, false>;
  return wp::launch(kernel, grid, dim3(kThreads), 0, stream, weight, block_shift, static_cast<T*>(out));
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
