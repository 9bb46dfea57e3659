// What an optimizer's step is given, and the numbers that are the same for all elements of a tensor. The arithmetic of
// an element stands with the kernels, which give the same bits: cpu/kernels/optim-inl.h, cuda/adamw_step.cuh and
// cuda/lion_step.cuh.
//
// Compiled without contraction, as core/arithmetic.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/half.h"

namespace qlora_native {

// One tensor that an optimizer updates: a row of ten 64-bit numbers, so that a table of addresses and sizes made
// elsewhere can be read as it is.
struct OptimTensor {
  void* param;               // [numel] of dtype
  const void* grad;          // [numel] of dtype
  void* exp_avg;             // [numel] float, or int8_t codes
  void* exp_avg_sq;          // [numel] float, or uint8_t codes
  float* exp_avg_absmax;     // [ceil(numel / kStateBlock)] beside codes, or null
  float* exp_avg_sq_absmax;  // [ceil(numel / kStateBlock)] beside codes, or null
  float* step;               // [1] steps taken so far
  int64_t numel;
  Dtype dtype;
  int64_t group;  // index of its options
};
static_assert(sizeof(OptimTensor) == 10 * sizeof(int64_t) && offsetof(OptimTensor, dtype) == 8 * sizeof(int64_t));

// The norm of gradients is summed in double precision in an order that depends on their sizes alone. The square of
// element i of a chunk goes to running sum i % kNormLanes of it, chunk after chunk of all tensors in order does the
// same, and a halving tree adds up each set of running sums.
inline constexpr int64_t kNormChunk = 8192;  // elements of one tensor; its last chunk may be shorter
inline constexpr int kNormLanes = 32;

// slot[i] += slot[i + half] for half of the slots, then for half of those, down to one.
QLORA_NATIVE_HD double sum_by_halves(double* slot) {  // [kNormLanes]
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      slot[i] += slot[i + half];
    }
  }
  return slot[0];
}

// base^exponent for exponent >= 0 by squaring, so that it rounds alike on every machine.
QLORA_NATIVE_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) {
      result *= base;
    }
    base *= base;
  }
  return result;
}

struct AdamwOptions {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled;  // AdamW: the parameter decays before its update. Adam: the decay is added to the gradient
};

struct AdamwFactors {
  float grad_factor;
  float keep;           // 1 - lr * decoupled weight decay
  float coupled_decay;  // weight decay that is added to the gradient
  float beta1;
  float rest1;  // 1 - beta1
  float beta2;
  float rest2;
  float root_correction;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;  // lr / (1 - beta1^step)
};

// steps: taken, this one included.
QLORA_NATIVE_HD AdamwFactors adamw_factors(const AdamwOptions& options, int64_t steps, double grad_factor) {
  AdamwFactors factors{};
  factors.grad_factor = static_cast<float>(grad_factor);
  factors.keep = options.decoupled ? static_cast<float>(1.0 - options.lr * options.weight_decay) : 1.0f;
  factors.coupled_decay = options.decoupled ? 0.0f : static_cast<float>(options.weight_decay);
  factors.beta1 = static_cast<float>(options.beta1);
  factors.rest1 = static_cast<float>(1.0 - options.beta1);
  factors.beta2 = static_cast<float>(options.beta2);
  factors.rest2 = static_cast<float>(1.0 - options.beta2);
  factors.root_correction = static_cast<float>(1.0 / std::sqrt(1.0 - power(options.beta2, steps)));
  factors.eps = static_cast<float>(options.eps);
  factors.step_size = static_cast<float>(options.lr / (1.0 - power(options.beta1, steps)));
  return factors;
}

struct LionOptions {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
};

struct LionFactors {
  float grad_factor;
  float keep;  // 1 - lr * weight decay
  float lr;
  float beta1;
  float rest1;
  float beta2;
  float rest2;
};

QLORA_NATIVE_HD LionFactors lion_factors(const LionOptions& options, double grad_factor) {
  LionFactors factors{};
  factors.grad_factor = static_cast<float>(grad_factor);
  factors.keep = static_cast<float>(1.0 - options.lr * options.weight_decay);
  factors.lr = static_cast<float>(options.lr);
  factors.beta1 = static_cast<float>(options.beta1);
  factors.rest1 = static_cast<float>(1.0 - options.beta1);
  factors.beta2 = static_cast<float>(options.beta2);
  factors.rest2 = static_cast<float>(1.0 - options.beta2);
  return factors;
}

}  // namespace qlora_native
