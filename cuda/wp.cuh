// Warp primitives: the verbs that kernels are written in. Inline PTX and architecture branches live here alone.
//
// The wider verbs move 16 bytes, the most that one thread loads or stores at once; their addresses are multiples of 16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/half.h"

// An array in shared memory, named so that an emulator can give each one bounds of its own.
#define WP_SHARED(type, name, count) __shared__ type name[count]

namespace qlora_native::wp {

// Launches on the stream without waiting for it. The error is this launch's own, and it is taken off the runtime's
// record, where another caller would mistake it for theirs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
  }
  return error;
}

// Read once: marked as the first to leave the cache.
__device__ __forceinline__ uint4 load_16_streaming(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
}

__device__ __forceinline__ void store_16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }

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
