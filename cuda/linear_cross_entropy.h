// What happens to a chunk of logits between the two products of linear_cross_entropy, on a CUDA device: see
// cpu/linear_cross_entropy.h. Pointers are device memory and trusted: the bindings check. Nothing here waits or
// allocates.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/half.h"

namespace qlora_native::cuda {

// Per row: losses = log(sum(exp(logits))) - logits[target]. With need_gradient, logits become softmax - onehot in
// place. A row whose target is ignore_index has the loss and the gradient 0; one whose target is no word otherwise has
// NaN, since nobody may wait to see it. Sums and exponentials are fp32, in an order that depends on the vocabulary
// alone. Needs no alignment beyond that of the types; with logits at a multiple of 16 bytes and rows of a multiple of
// 16 bytes it is fast.
cudaError_t launch_softmax_loss(Dtype dtype,
                                void* logits,            // [rows, vocabulary]
                                const int64_t* targets,  // [rows]
                                int64_t ignore_index, int64_t rows, int64_t vocabulary, bool need_gradient,
                                float* losses,  // [rows]
                                cudaStream_t stream);

}  // namespace qlora_native::cuda
