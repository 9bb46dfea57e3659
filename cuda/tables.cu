#include <array>
#include <atomic>

#include "cuda/tables.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {
namespace {

constexpr int kDevices = 64;  // whose addresses are kept; beyond, the runtime is asked every time

}  // namespace

// Neither const nor static, which would allow the compiler to drop what no kernel names.
__device__ BuiltInTables device_tables = {{nf4_levels(), fp4_levels()}, kNestedCode};

cudaError_t built_in_tables(const BuiltInTables*& tables) {
  static std::array<std::atomic<const BuiltInTables*>, kDevices> known{};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) {
    return error;
  }
  const bool is_kept = device < kDevices;
  tables = is_kept ? known[static_cast<size_t>(device)].load(std::memory_order_acquire) : nullptr;
  if (tables == nullptr) {
    void* address = nullptr;
    error = cudaGetSymbolAddress(&address, static_cast<const void*>(&device_tables));
    tables = static_cast<const BuiltInTables*>(address);
    if (is_kept && error == cudaSuccess) {
      known[static_cast<size_t>(device)].store(tables, std::memory_order_release);
    }
  }
  return error;
}

}  // namespace qlora_native::cuda
