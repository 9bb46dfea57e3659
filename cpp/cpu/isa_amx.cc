#define QLORA_NATIVE_ISA_NAMESPACE amx_impl
#include "cpu/kernels-inl.h"

namespace qlora_native::cpu {

const Kernels& amx_kernels() { return amx_impl::kTable; }

}  // namespace qlora_native::cpu
