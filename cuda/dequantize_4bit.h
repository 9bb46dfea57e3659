// Decode a quantized weight to fp32, bf16 or fp16 on a CUDA device. Pointers are trusted: the bindings check.
#pragma once

#include <cuda_runtime_api.h>

#include "core/half.h"
#include "core/panel.h"
#include "core/weight_view.h"

namespace qlora_native::cuda {

// Every pointer of the weight, its levels and nested code included, is readable from the stream's device. Does not
// wait. Needs no alignment beyond that of the types; with `packed` and `out` at multiples of 16 bytes it is fast.
cudaError_t launch_dequantize_4bit(const WeightView& weight, Dtype dtype,
                                   void* out,  // [weight.numel]
                                   cudaStream_t stream);

// A panel alone. Fast if it begins at a multiple of 32 elements and, unless it has whole rows, has a multiple of 1024
// columns, and the weight one of 32.
cudaError_t launch_dequantize_4bit(const WeightView& weight, const Panel& panel, Dtype dtype,
                                   void* out,  // [panel.rows(), panel.columns()]
                                   cudaStream_t stream);

// Whether the current device can run the kernels of this build: cudaErrorNoKernelImageForDevice, or another error, if
// it cannot.
cudaError_t find_image();

}  // namespace qlora_native::cuda
