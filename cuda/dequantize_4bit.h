// Decode a quantized weight to fp32, bf16 or fp16 on a CUDA device. Pointers are trusted: the bindings check.
#pragma once

#include <cuda_runtime_api.h>

#include "core/half.h"
#include "core/weight_view.h"

namespace qlora_native::cuda {

// Every pointer of the weight, its levels and nested code included, is readable from the stream's device. Does not
// wait. Needs no alignment beyond that of the types; with `packed` and `out` at multiples of 16 bytes it is fast.
cudaError_t launch_dequantize_4bit(const WeightView& weight, Dtype dtype,
                                   void* out,  // [weight.numel]
                                   cudaStream_t stream);

// The elements [first, first + count) alone: a panel of rows. Fast if `first` is a multiple of 32 besides.
cudaError_t launch_dequantize_4bit(const WeightView& weight, int64_t first, int64_t count, Dtype dtype,
                                   void* out,  // [count]
                                   cudaStream_t stream);

}  // namespace qlora_native::cuda
