#include "core/gguf.h"
#include "cuda/linear_4bit.cuh"

namespace qlora_native::cuda {

cudaError_t launch_linear_4bit(const ProductJob& product, const MatmulPlan& plan, void* workspace,
                               cudaStream_t stream) {
  if (product.m == 0 || product.width() == 0) {
    return cudaSuccess;
  }
  const bool has_blocks = is_gguf(product.weight.type);
  if (!has_blocks && !rows_are_regular(product.n, product.k, product.weight.block_size, product.forward)) {
    return cudaErrorInvalidValue;
  }
  switch (product.dtype) {
    case Dtype::kBfloat16:
      return has_blocks ? launch_gguf<Bf16>(product, plan, workspace, stream)
                        : launch_linear<Bf16>(product, plan, workspace, stream);
    case Dtype::kFloat16:
      return has_blocks ? launch_gguf<Fp16>(product, plan, workspace, stream)
                        : launch_linear<Fp16>(product, plan, workspace, stream);
    case Dtype::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora_native::cuda
