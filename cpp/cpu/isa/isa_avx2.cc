#define QLORA_NATIVE_ISA_NAMESPACE avx2_impl
#include "cpu/kernels/all-inl.h"

namespace qlora_native::cpu {

const Kernels& avx2_kernels() { return avx2_impl::kTable; }

}  // namespace qlora_native::cpu
