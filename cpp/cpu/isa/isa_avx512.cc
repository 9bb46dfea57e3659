#define QLORA_NATIVE_ISA_NAMESPACE avx512_impl
#include "cpu/kernels/all-inl.h"

namespace qlora_native::cpu {

const Kernels& avx512_kernels() { return avx512_impl::kTable; }

}  // namespace qlora_native::cpu
