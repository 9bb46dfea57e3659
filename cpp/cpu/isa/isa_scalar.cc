#define QLORA_NATIVE_ISA_NAMESPACE scalar_impl
#include "cpu/kernels/all-inl.h"

namespace qlora_native::cpu {

const Kernels& scalar_kernels() { return scalar_impl::kTable; }

}  // namespace qlora_native::cpu
