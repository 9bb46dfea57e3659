// Warp primitives, in which kernels are written. Inline PTX and architecture branches live here alone.
//
// The wider ones move 16 bytes, the most that one thread loads or stores at once; their addresses are multiples of 16.
// Those of the whole warp (ldmatrix, mma) are called by all 32 lanes. PTX sections: those of the PTX ISA manual 9.0.
#pragma once

#if defined(QLORA_NATIVE_EMULATED)
#include <cuda_on_cpu/wp_emulated.h>  // the same primitives for the CPU, from the include path of the emulator's build
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/half.h"

// An array in shared memory, named so that an emulator can give each one bounds of its own.
#define WP_SHARED(type, name, count) __shared__ type name[count]

namespace qlora_native::wp {

// The runtime's launch of a kernel.
template <typename... Parameters>
cudaError_t launch_configured(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Parameters... values) {
  return cudaLaunchKernelEx(&config, kernel, values...);
}

// The launch's dynamic shared memory, at a multiple of 128 bytes. Every call in a kernel gives the same address.
template <typename T>
__device__ __forceinline__ T* dyn_smem() {
  extern __shared__ __align__(128) unsigned char wp_dynamic_shared[];
  return reinterpret_cast<T*>(wp_dynamic_shared);
}

__device__ __forceinline__ uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }

// Read once: marked as the first to leave the cache.
__device__ __forceinline__ uint4 load_16_streaming(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
}

__device__ __forceinline__ void store_16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }

__device__ __forceinline__ uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// 16 bytes from global to shared memory, past the L1 cache and past the registers, the rest of their 128 into the L2
// cache, for neighbors and later steps: the first src_bytes (0 to 16) are read, the rest are zeros. They are there
// once the thread has waited for the group; other threads need a barrier after that (section 9.7.9.25). On sm_75, which
// has no such copy, the thread carries it out at once.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int src_bytes = 16) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(src_bytes)
               : "memory");
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (src_bytes >= 16) {
    value = *static_cast<const uint4*>(global);
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < src_bytes) {
        words[i / 4] |= static_cast<uint32_t>(static_cast<const uint8_t*>(global)[i]) << (i % 4 * 8);
      }
    }
    value = make_uint4(words[0], words[1], words[2], words[3]);
  }
  *static_cast<uint4*>(shared) = value;
#endif
}

// Closes the group of the copies that this thread has started since the last commit; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but this thread's kPending last groups are complete.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane 8i + j gives the address of row j of matrix i, 8
// elements at a multiple of 16 bytes; lane 4g + t gets elements 2t and 2t + 1 of row g of matrix i in r[i] (section
// 9.7.14.5.15). With _trans, elements 2t and 2t + 1 of column g.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b with a [16, 8], b [8, 8], d [16, 8] (section 9.7.14.5.7). Lane 4g + t holds, low half first: a[0] = row g,
// columns 2t and 2t + 1; a[1] = row g + 8; b = rows 2t and 2t + 1 of column g; d[0], d[1] = row g, columns 2t and
// 2t + 1; d[2], d[3] = row g + 8. Products and sums are fp32.
__device__ __forceinline__ void mma_m16n8k8_fp16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

// d += a b with a [16, 16], b [16, 8], d [16, 8] (section 9.7.14.5.8): as m16n8k8 for columns 0 to 7 of a and rows 0
// to 7 of b in a[0], a[1] and b[0]; a[2], a[3] and b[1] hold the other half of the inner dimension in the same way.
// On sm_75 bf16 traps: that architecture has no such product, and the plan never asks for one.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) = delete;

template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  (void)d, (void)a, (void)b;
  asm volatile("trap;");
#endif
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const uint32_t low[2] = {a[0], a[1]};
  const uint32_t high[2] = {a[2], a[3]};
  mma_m16n8k8_fp16(d, low, b[0]);
  mma_m16n8k8_fp16(d, high, b[1]);
#endif
}

// Four of the eight bytes of x and y: a nibble of the low half of `selectors` has 0 to 7 for one of them (section
// 9.7.9.7). __byte_perm allows more than 7, for which the compiler masks selectors again.
__device__ __forceinline__ uint32_t select_bytes(uint32_t x, uint32_t y, uint32_t selectors) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(x), "r"(y), "r"(selectors));
  return bytes;
}

// The compiler moves no MMA and no access to memory across this, either way, as the thread might exit here. It never
// does: `positive` is at least 1, and `index` (from 0 on) only keeps the compiler from merging the calls of one loop.
__device__ __forceinline__ void scheduling_fence(int positive, int index) {
  asm volatile("{.reg .pred p; setp.lt.s32 p, %0, %1; @p exit;}" ::"r"(positive), "r"(-index) : "memory");
}

}  // namespace qlora_native::wp
#endif

#include <map>
#include <mutex>
#include <utility>

namespace qlora_native::wp {

inline constexpr size_t kSharedWithoutAsking = 48 * 1024;  // bytes of dynamic shared memory that any kernel may have

// Lets the kernel have this much dynamic shared memory on the current device. The first to ask gets all that the device
// has beside the kernel's static memory: were each launch to set its own size, one of another host thread in between
// could find less than it needs.
inline cudaError_t allow_shared(const void* kernel, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;  // by kernel and device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& so_far = allowed[{kernel, device}];
  if (error != cudaSuccess || shared_bytes <= so_far) {
    return error;
  }
  int most = 0;
  cudaFuncAttributes attributes{};
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernel) : error;
  most -= static_cast<int>(attributes.sharedSizeBytes);
  error =
      error == cudaSuccess ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) : error;
  so_far = error == cudaSuccess ? static_cast<size_t>(most) : so_far;
  return error;
}

// Launches on the stream without waiting for it. The error is this launch's own, and it is taken off the runtime's
// record, where another caller would mistake it for theirs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking) {
    error = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = launch_configured<Parameters...>(config, kernel, static_cast<Parameters>(arguments)...);
  }
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
  }
  return error;
}

// One 32-bit word of output from consecutive values, rounded to nearest, ties to even, the first in the lowest bits.
template <typename T>
__device__ __forceinline__ uint32_t pack_word(const float* values) = delete;  // [4 / sizeof(T)]

template <>
__device__ __forceinline__ uint32_t pack_word<float>(const float* values) {
  return __float_as_uint(values[0]);
}

template <>
__device__ __forceinline__ uint32_t pack_word<Bf16>(const float* values) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
}

template <>
__device__ __forceinline__ uint32_t pack_word<Fp16>(const float* values) {
  const __half2 pair = __floats2half2_rn(values[0], values[1]);
  return static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16 | __half_as_ushort(pair.x);
}

}  // namespace qlora_native::wp
