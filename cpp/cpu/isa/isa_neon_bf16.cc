#define QLORA_NATIVE_ISA_NAMESPACE neon_bf16_impl
#define QLORA_NATIVE_NEON  // arm64 compilers have it at hand for the scalar kernels too
#include "cpu/kernels/all-inl.h"

namespace qlora_native::cpu {

const Kernels& neon_bf16_kernels() { return neon_bf16_impl::kTable; }

}  // namespace qlora_native::cpu
