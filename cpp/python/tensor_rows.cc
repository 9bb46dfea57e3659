#include "python/tensor_rows.h"

namespace qlora_native::python {
namespace {

// As pointer() and require(), but no sentence is built while all is well: there are a dozen checks a tensor each step.
template <typename T>
T* checked(int64_t address, int64_t count, const char* what) {
  const auto at = static_cast<Address>(address);
  return (at != 0 || count == 0) && at % alignof(T) == 0 ? reinterpret_cast<T*>(at) : pointer<T>(at, count, what);
}

void check_range(int64_t value, int64_t end, const char* what) {
  if (value < 0 || value >= end) {
    require(false, std::string(what) + " is " + std::to_string(value) + ": expected 0 or more, and less than " +
                       std::to_string(end) + ".");
  }
}

void* values(int64_t address, int64_t count, Dtype dtype, const char* what) {
  return dtype == Dtype::kFloat32 ? static_cast<void*>(checked<float>(address, count, what))
                                  : checked<uint16_t>(address, count, what);
}

// The codes of a state, or its floats where no absmax goes with it.
void* state(int64_t address, int64_t absmax, int64_t count, const char* what) {
  return absmax != 0 ? static_cast<void*>(checked<uint8_t>(address, count, what))
                     : checked<float>(address, count, what);
}

}  // namespace

std::vector<OptimTensor> checked_rows(Address rows, int64_t num_tensors, const RowUse& use) {
  constexpr int64_t kMost = int64_t{1} << 60;
  check_range(num_tensors, kMost, "num_tensors");
  const int64_t* row = pointer<const int64_t>(rows, num_tensors, "rows");
  std::vector<OptimTensor> tensors(static_cast<size_t>(num_tensors));
  for (OptimTensor& tensor : tensors) {
    check_range(row[kNumel], kMost, "numel");
    check_range(row[kDtype], 3, "dtype");
    tensor.numel = row[kNumel];
    tensor.dtype = static_cast<Dtype>(row[kDtype]);
    tensor.grad = values(row[kGrad], tensor.numel, tensor.dtype, "grad");
    if (use.updates) {
      const int64_t blocks = (tensor.numel + kStateBlock - 1) / kStateBlock;
      check_range(row[kGroup], use.num_groups, "group");
      tensor.group = row[kGroup];
      tensor.param = values(row[kParam], tensor.numel, tensor.dtype, "param");
      tensor.exp_avg = state(row[kExpAvg], row[kExpAvgAbsmax], tensor.numel, "exp_avg");
      tensor.exp_avg_absmax = row[kExpAvgAbsmax] == 0 ? nullptr : checked<float>(row[kExpAvgAbsmax], blocks, "absmax");
      if (use.second_moment) {
        if ((row[kExpAvgAbsmax] == 0) != (row[kExpAvgSqAbsmax] == 0)) {
          require(false, "only one of the two moments has an absmax: expected both or none.");
        }
        tensor.exp_avg_sq = state(row[kExpAvgSq], row[kExpAvgSqAbsmax], tensor.numel, "exp_avg_sq");
        tensor.exp_avg_sq_absmax =
            row[kExpAvgSqAbsmax] == 0 ? nullptr : checked<float>(row[kExpAvgSqAbsmax], blocks, "absmax");
        tensor.step = checked<float>(row[kStep], 1, "step");
      }
    }
    row += kRowLength;
  }
  return tensors;
}

}  // namespace qlora_native::python
