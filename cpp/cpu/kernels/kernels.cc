#include "cpu/kernels/kernels.h"

namespace qlora_native::cpu {
namespace {

#if defined(__x86_64__)

// Everything else that AVX512-BF16 brings stays; the products are AVX-512's.
Kernels with_products_by_multiply_add() {
  constexpr int kIndex = static_cast<int>(Dtype::kBfloat16);
  Kernels table = avx512_bf16_kernels();
  table.gemm[kIndex] = avx512_kernels().gemm[kIndex];
  return table;
}

const Kernels& avx512_bf16_kernels_of_this_cpu() {
  static const Kernels multiply_add = with_products_by_multiply_add();
  return bf16_dot_is_slow() ? multiply_add : avx512_bf16_kernels();
}

#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (current_isa()) {
#if defined(__x86_64__)
      case Isa::kAmx:
        return amx_kernels();
      case Isa::kAvx512Bf16:
        return avx512_bf16_kernels_of_this_cpu();
      case Isa::kAvx512:
        return avx512_kernels();
      case Isa::kAvx2:
        return avx2_kernels();
#elif defined(__aarch64__)
      case Isa::kNeonBf16:
        return neon_bf16_kernels();
      case Isa::kNeon:
        return neon_kernels();
#endif
      default:
        return scalar_kernels();
    }
  }();
  return chosen;
}

}  // namespace qlora_native::cpu
