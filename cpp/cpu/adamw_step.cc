#include "cpu/adamw_step.h"

#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/tensor_list.h"

namespace qlora_native::cpu {
namespace {

AdamwJob job_of(const OptimTensor& tensor, const AdamwOptions& options, double grad_factor) {
  AdamwJob job{};
  job.param = tensor.param;
  job.grad = tensor.grad;
  job.exp_avg = tensor.exp_avg;
  job.exp_avg_sq = tensor.exp_avg_sq;
  job.exp_avg_absmax = tensor.exp_avg_absmax;
  job.exp_avg_sq_absmax = tensor.exp_avg_sq_absmax;
  job.numel = tensor.numel;
  job.by = adamw_factors(options, static_cast<int64_t>(*tensor.step), grad_factor);
  return job;
}

}  // namespace

void adamw_step(const OptimTensor* tensors, int64_t num_tensors, const AdamwOptions* options, double grad_factor,
                const UpdateOrder& order) {
  const IeeeArithmetic ieee;
  std::vector<AdamwJob> jobs(static_cast<size_t>(num_tensors));
  for (int64_t i = 0; i < num_tensors; ++i) {
    *tensors[i].step += 1.0f;
    jobs[static_cast<size_t>(i)] = job_of(tensors[i], options[tensors[i].group], grad_factor);
  }
  const OptimKernels& table = kernels().optim;
  update_in(order, tensors, num_tensors, [&](const StatePart* parts, int64_t num_parts, int64_t grain) {
    for_blocks_of_parts(parts, num_parts, kStateBlock, grain, [&](int64_t i, int64_t first, int64_t last) {
      table.adamw_blocks[static_cast<int>(tensors[i].dtype)](jobs[static_cast<size_t>(i)], first, last);
    });
  });
}

}  // namespace qlora_native::cpu
