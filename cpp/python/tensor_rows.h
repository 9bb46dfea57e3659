// The table of tensors that the optimizers' functions are given: int64 [num_tensors, kRowLength], addresses and sizes.
#pragma once

#include <vector>

#include "core/optim.h"
#include "core/state_code.h"
#include "python/bindings.h"

namespace qlora_native::python {

// Columns of a row, in order; 0 for an address that a tensor does not have.
enum RowColumn {
  kParam,
  kGrad,
  kExpAvg,
  kExpAvgSq,
  kExpAvgAbsmax,
  kExpAvgSqAbsmax,
  kStep,
  kNumel,
  kDtype,
  kGroup,
  kRowLength
};

// Which columns a function reads, beside grad, numel and dtype.
struct RowUse {
  bool updates;  // param, exp_avg, group
  bool second_moment;
  int64_t num_groups;
};

// Reads the rows; std::invalid_argument for null or misaligned addresses and for numbers out of range.
std::vector<OptimTensor> checked_rows(Address rows, int64_t num_tensors, const RowUse& use);

}  // namespace qlora_native::python
