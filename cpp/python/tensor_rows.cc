#include "python/tensor_rows.h"

namespace qlora_native::python {
namespace {

void* values(int64_t address, int64_t count, Dtype dtype, const char* what) {
  const auto at = static_cast<Address>(address);
  return dtype == Dtype::kFloat32 ? static_cast<void*>(pointer<float>(at, count, what))
                                  : pointer<uint16_t>(at, count, what);
}

// The codes of a state, or its floats where no absmax goes with it.
void* state(int64_t address, int64_t absmax, int64_t count, const char* what) {
  const auto at = static_cast<Address>(address);
  return absmax != 0 ? static_cast<void*>(pointer<uint8_t>(at, count, what)) : pointer<float>(at, count, what);
}

}  // namespace

std::vector<cpu::OptimTensor> checked_rows(Address rows, int64_t num_tensors, const RowUse& use) {
  require(num_tensors >= 0, "num_tensors is " + std::to_string(num_tensors) + ": expected 0 or more.");
  const int64_t* row = pointer<const int64_t>(rows, num_tensors, "rows");
  std::vector<cpu::OptimTensor> tensors;
  tensors.reserve(static_cast<size_t>(num_tensors));
  for (int64_t i = 0; i < num_tensors; ++i, row += kRowLength) {
    cpu::OptimTensor tensor{};
    tensor.numel = row[kNumel];
    require(tensor.numel >= 0, "numel is " + std::to_string(tensor.numel) + ": expected 0 or more.");
    tensor.dtype = checked_dtype(static_cast<int>(row[kDtype]));
    tensor.grad = values(row[kGrad], tensor.numel, tensor.dtype, "grad");
    if (use.updates) {
      const int64_t blocks = (tensor.numel + kStateBlock - 1) / kStateBlock;
      const auto absmax = [&](RowColumn column, const char* what) {
        return row[column] == 0 ? nullptr : pointer<float>(static_cast<Address>(row[column]), blocks, what);
      };
      tensor.group = row[kGroup];
      require(
          tensor.group >= 0 && tensor.group < use.num_groups,
          "group is " + std::to_string(tensor.group) + ": expected 0 to " + std::to_string(use.num_groups - 1) + ".");
      tensor.param = values(row[kParam], tensor.numel, tensor.dtype, "param");
      tensor.exp_avg = state(row[kExpAvg], row[kExpAvgAbsmax], tensor.numel, "exp_avg");
      tensor.exp_avg_absmax = absmax(kExpAvgAbsmax, "exp_avg_absmax");
      if (use.second_moment) {
        require((row[kExpAvgAbsmax] == 0) == (row[kExpAvgSqAbsmax] == 0),
                "only one of the two moments has an absmax: expected both or none.");
        tensor.exp_avg_sq = state(row[kExpAvgSq], row[kExpAvgSqAbsmax], tensor.numel, "exp_avg_sq");
        tensor.exp_avg_sq_absmax = absmax(kExpAvgSqAbsmax, "exp_avg_sq_absmax");
        tensor.step = pointer<float>(static_cast<Address>(row[kStep]), 1, "step");
      }
    }
    tensors.push_back(tensor);
  }
  return tensors;
}

}  // namespace qlora_native::python
