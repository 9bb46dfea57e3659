// Quantize to 4 bits on a CUDA device, with or without double quantization: the bytes of cpu/quantize_4bit.h. Pointers
// are device memory and trusted: the bindings check. Nothing here waits or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/codebook.h"
#include "core/half.h"

namespace qlora_native::cuda {

// Once the stream has come to it, *first_bad is the lowest index of a non-finite element, or -1: then all are finite
// and the outputs are complete. Needs no alignment beyond that of the types; with x and packed at multiples of 16
// bytes it is fast.
cudaError_t launch_quantize_4bit(const void* x,  // [numel]
                                 Dtype dtype, int64_t numel, int64_t block_size, QuantType type,
                                 uint8_t* packed,     // [ceil(numel / 2)]
                                 float* absmax,       // [blocks]
                                 int64_t* first_bad,  // [1]
                                 cudaStream_t stream);

// Bytes of the workspace of launch_quantize_scales, at a multiple of 8; what it holds does not matter.
int64_t quantize_scales_workspace(int64_t blocks);

// Double quantization; the mean is summed in the fixed order of the CPU. Scales that are not finite give codes without
// meaning.
cudaError_t launch_quantize_scales(const float* absmax,  // [blocks]
                                   int64_t blocks,
                                   uint8_t* codes,        // [blocks]
                                   float* nested_absmax,  // [ceil(blocks / 256)]
                                   float* nested_offset,  // [1]
                                   void* workspace,       // [quantize_scales_workspace(blocks)] bytes
                                   cudaStream_t stream);

}  // namespace qlora_native::cuda
