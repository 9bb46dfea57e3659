#define QLORA_NATIVE_ISA_NAMESPACE amx_impl
#include "cpu/kernels/all-inl.h"
// What builds on them.
#include "cpu/kernels/gemm-amx-inl.h"

namespace qlora_native::cpu {

const Kernels& amx_kernels() {
  static constexpr Kernels kWithTiles = [] {
    Kernels table = amx_impl::kTable;
    table.tiles = &amx_impl::kTileKernels;
    return table;
  }();
  return kWithTiles;
}

}  // namespace qlora_native::cpu
