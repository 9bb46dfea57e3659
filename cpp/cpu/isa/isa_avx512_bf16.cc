#define QLORA_NATIVE_ISA_NAMESPACE avx512_bf16_impl
#include "cpu/kernels/all-inl.h"

namespace qlora_native::cpu {

const Kernels& avx512_bf16_kernels() { return avx512_bf16_impl::kTable; }

}  // namespace qlora_native::cpu
