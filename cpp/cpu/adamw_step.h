// One step of Adam or AdamW over many tensors. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "cpu/tensor_list.h"

namespace qlora_native::cpu {

struct AdamwOptions {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled;  // AdamW: the parameter decays before its update. Adam: the decay is added to the gradient
};

// grad_factor multiplies every gradient. The bytes written do not depend on the number of threads.
void adamw_step(const OptimTensor* tensors,  // [num_tensors]
                int64_t num_tensors,
                const AdamwOptions* options,  // [groups]
                double grad_factor);

// base^exponent for exponent >= 0 by squaring, so that it rounds alike on every machine.
double power(double base, int64_t exponent);

}  // namespace qlora_native::cpu
