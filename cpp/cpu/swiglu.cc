#include "cpu/swiglu.h"

#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {

void swiglu(const SwigluJob& job, int64_t numel, Dtype dtype) {
  const auto kernel = kernels().activations.swiglu_span[static_cast<int>(dtype)];
  parallel_for(numel, kActivationsPerTask, [&](int64_t first, int64_t last) { kernel(job, first, last); });
}

void swiglu_backward(const SwigluGradJob& job, int64_t numel, Dtype dtype) {
  const auto kernel = kernels().activations.swiglu_grad_span[static_cast<int>(dtype)];
  parallel_for(numel, kActivationsPerTask, [&](int64_t first, int64_t last) { kernel(job, first, last); });
}

}  // namespace qlora_native::cpu
