// What the optimizers' bindings are given: addresses in device memory of a table of tensors and of its chunks.
#pragma once

#include "cuda/tensor_list.h"
#include "python/bindings.h"

namespace qlora_native::python {

inline cuda::OptimTable checked_table(Address tensors, Address chunks, int64_t num_tensors, int64_t num_chunks) {
  require(num_tensors >= 0 && num_chunks >= 0, "num_tensors or num_chunks is negative.");
  return {pointer<const OptimTensor>(tensors, num_tensors, "tensors"),
          pointer<const cuda::OptimChunk>(chunks, num_chunks, "chunks"), num_tensors, num_chunks};
}

inline cuda::StepInputs checked_inputs(double grad_factor, double max_norm, Address grad_scale, Address found_inf,
                                       Address norm) {
  return {grad_factor, max_norm, pointer<const float>(grad_scale, 0, "grad_scale"),
          pointer<const float>(found_inf, 0, "found_inf"), pointer<const double>(norm, 0, "norm")};
}

inline cuda::StepResults checked_results(Address grad_norm, Address skipped) {
  return {pointer<double>(grad_norm, 0, "grad_norm"), pointer<float>(skipped, 0, "skipped")};
}

}  // namespace qlora_native::python
