// The primitives of cuda/wp.cuh, carried out by the emulator. Kernels see this in place of the PTX.
#pragma once

#include "cuda_on_cpu/builtins.h"
// The CUDA headers come first.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <type_traits>

#include "core/half.h"
#include "cuda_on_cpu/async_copy.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/math_intrinsics.h"
#include "cuda_on_cpu/matrix.h"
#include "cuda_on_cpu/memory_intrinsics.h"
#include "cuda_on_cpu/shared_memory.h"
#include "cuda_on_cpu/warp_intrinsics.h"

// The lambda's variable gives each declaration, and each instantiation of a template, an identity of its own.
#define WP_SHARED(type, name, count)                                       \
  type(&name)[count] = *static_cast<type(*)[count]>(::cuemu::shared_array( \
      [] {                                                                 \
        static char identity;                                              \
        return static_cast<const void*>(&identity);                        \
      }(),                                                                 \
      #name, sizeof(type) * static_cast<size_t>(count), alignof(type), ::cuemu::Site{__FILE__, __LINE__}))

namespace qlora_native::wp {

using cuemu::Site;

// The kernel and its parameters as they are now: what a graph launches later, too. One block of memory, so that the
// kernel's reads of it can be recognized.
template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> values;
};

template <typename... Parameters>
cudaError_t launch_configured(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Parameters... values) {
  const auto call =
      std::make_shared<const Call<Parameters...>>(Call<Parameters...>{kernel, std::tuple<Parameters...>(values...)});
  return cuemu::launch({reinterpret_cast<const void*>(kernel), config.gridDim, config.blockDim, config.dynamicSmemBytes,
                        config.stream, call},
                       sizeof(*call), [raw = call.get()] { std::apply(raw->kernel, raw->values); });
}

template <typename T>
T* dyn_smem(Site site = Site::here()) {
  return static_cast<T*>(cuemu::dynamic_shared(alignof(T), site));
}

CUEMU_CHECKED inline uint4 load_16(const void* address, Site site = Site::here()) {
  cuemu::check_access(address, 16, 16, cuemu::Access::kRead, "load_16", site);
  return *static_cast<const uint4*>(address);
}

inline uint4 load_16_streaming(const void* address, Site site = Site::here()) {
  return cuemu::load_global(static_cast<const uint4*>(address), "load_16_streaming", site);
}

CUEMU_CHECKED inline void store_16(void* address, uint4 value, Site site = Site::here()) {
  cuemu::check_access(address, 16, 16, cuemu::Access::kWrite, "store_16", site);
  *static_cast<uint4*>(address) = value;
}

inline void cp_async_16(void* shared, const void* global, int src_bytes = 16, Site site = Site::here()) {
  cuemu::issue_copy(shared, global, src_bytes, site);
}

inline uint32_t select_bytes(uint32_t x, uint32_t y, uint32_t selectors) { return __byte_perm(x, y, selectors); }

inline void scheduling_fence(int, int) {}

inline void cp_async_commit() { cuemu::commit_copies(); }

template <int kPending>
void cp_async_wait(Site site = Site::here()) {
  cuemu::wait_for_copies(kPending, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  cuemu::load_matrices(r, row, cuemu::Trans::kNo, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  cuemu::load_matrices(r, row, cuemu::Trans::kYes, site);
}

inline void mma_m16n8k8_fp16(float (&d)[4], const uint32_t (&a)[2], uint32_t b, Site site = Site::here()) {
  cuemu::multiply(d, a, &b, Dtype::kFloat16, false, site);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>);
  cuemu::multiply(d, a, b, std::is_same_v<T, Bf16> ? Dtype::kBfloat16 : Dtype::kFloat16, true, site);
}

}  // namespace qlora_native::wp
