#include "cuda/linear_4bit.cuh"

namespace qlora_native::cuda {

template cudaError_t launch_reduce<Fp16>(const TileJob<Fp16>&, int, cudaStream_t);
template cudaError_t launch_linear<Fp16>(const ProductJob&, const MatmulPlan&, void*, cudaStream_t);

}  // namespace qlora_native::cuda
