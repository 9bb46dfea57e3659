#include "cuda/linear_4bit_gguf.cuh"

namespace qlora_native::cuda {

template cudaError_t launch_gguf<Bf16>(const ProductJob&, const MatmulPlan&, void*, cudaStream_t);
template cudaError_t launch_gguf<Fp16>(const ProductJob&, const MatmulPlan&, void*, cudaStream_t);

}  // namespace qlora_native::cuda
