#include "cpu/adamw_step.h"

#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tensor_list.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kBlocksPerTask = 32;

AdamwJob job_of(const OptimTensor& tensor, const AdamwOptions& options, double correction1, double correction2,
                double grad_factor) {
  AdamwJob job{};
  job.param = tensor.param;
  job.grad = tensor.grad;
  job.exp_avg = tensor.exp_avg;
  job.exp_avg_sq = tensor.exp_avg_sq;
  job.exp_avg_absmax = tensor.exp_avg_absmax;
  job.exp_avg_sq_absmax = tensor.exp_avg_sq_absmax;
  job.numel = tensor.numel;
  job.grad_factor = static_cast<float>(grad_factor);
  job.keep = options.decoupled ? static_cast<float>(1.0 - options.lr * options.weight_decay) : 1.0f;
  job.coupled_decay = options.decoupled ? 0.0f : static_cast<float>(options.weight_decay);
  job.beta1 = static_cast<float>(options.beta1);
  job.rest1 = static_cast<float>(1.0 - options.beta1);
  job.beta2 = static_cast<float>(options.beta2);
  job.rest2 = static_cast<float>(1.0 - options.beta2);
  job.root_correction = static_cast<float>(1.0 / std::sqrt(correction2));
  job.eps = static_cast<float>(options.eps);
  job.step_size = static_cast<float>(options.lr / correction1);
  return job;
}

}  // namespace

double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) {
      result *= base;
    }
    base *= base;
  }
  return result;
}

void adamw_step(const OptimTensor* tensors, int64_t num_tensors, const AdamwOptions* options, double grad_factor) {
  const IeeeArithmetic ieee;
  std::vector<AdamwJob> jobs(static_cast<size_t>(num_tensors));
  for (int64_t i = 0; i < num_tensors; ++i) {
    const OptimTensor& tensor = tensors[i];
    const AdamwOptions& by = options[tensor.group];
    *tensor.step += 1.0f;
    const auto steps = static_cast<int64_t>(*tensor.step);
    jobs[static_cast<size_t>(i)] =
        job_of(tensor, by, 1.0 - power(by.beta1, steps), 1.0 - power(by.beta2, steps), grad_factor);
  }
  const OptimKernels& table = kernels().optim;
  for_blocks_of_tensors(
      num_tensors, kStateBlock, kBlocksPerTask, [&](int64_t i) { return tensors[i].numel; },
      [&](int64_t i, int64_t first, int64_t last) {
        table.adamw_blocks[static_cast<int>(tensors[i].dtype)](jobs[static_cast<size_t>(i)], first, last);
      });
}

}  // namespace qlora_native::cpu
