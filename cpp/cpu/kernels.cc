#include "cpu/kernels.h"

namespace qlora_native::cpu {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (current_isa()) {
#if defined(__x86_64__)
      case Isa::kAmx:
        return amx_kernels();
      case Isa::kAvx512Bf16:
        return avx512_bf16_kernels();
      case Isa::kAvx512:
        return avx512_kernels();
      case Isa::kAvx2:
        return avx2_kernels();
#endif
      default:
        return scalar_kernels();
    }
  }();
  return chosen;
}

}  // namespace qlora_native::cpu
