#include "cuda/linear_4bit.cuh"

namespace qlora_native::cuda {

template cudaError_t launch_reduce<Bf16>(const TileJob<Bf16>&, int, cudaStream_t);
template cudaError_t launch_linear<Bf16>(const ProductJob&, const MatmulPlan&, void*, cudaStream_t);

}  // namespace qlora_native::cuda
