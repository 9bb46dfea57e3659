// What happens to a chunk of logits between the two products of linear_cross_entropy.
#pragma once

#include <cstdint>

#include "core/half.h"

namespace qlora_native::cpu {

// Per row: losses = log(sum(exp(logits))) - logits[target]. With need_gradient, logits become softmax - onehot in
// place.
void softmax_loss(Dtype dtype,
                  void* logits,            // [rows, vocabulary]
                  const int64_t* targets,  // [rows], 0 <= target < vocabulary
                  int64_t rows, int64_t vocabulary, bool need_gradient,
                  float* losses);  // [rows]

}  // namespace qlora_native::cpu
