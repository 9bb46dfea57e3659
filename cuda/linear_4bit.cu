#include "cuda/linear_4bit.cuh"

namespace qlora_native::cuda {

cudaError_t launch_linear_4bit(const LinearCall& call, const MatmulPlan& plan, void* workspace, cudaStream_t stream) {
  if (call.m == 0 || (call.forward ? call.n : call.k) == 0) {
    return cudaSuccess;
  }
  if (!rows_are_regular(call.n, call.k, call.weight.block_size, call.forward)) {
    return cudaErrorInvalidValue;
  }
  switch (call.dtype) {
    case Dtype::kBfloat16:
      return launch_linear<Bf16>(call, plan, workspace, stream);
    case Dtype::kFloat16:
      return launch_linear<Fp16>(call, plan, workspace, stream);
    case Dtype::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora_native::cuda
