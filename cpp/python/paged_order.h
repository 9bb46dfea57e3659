// The order in which a bound optimizer's step updates its tensors.
#pragma once

#include <string>
#include <vector>

#include "cpu/files/paging.h"
#include "python/bindings.h"

namespace qlora_native::python {

// A single run without a pager, else as the pager goes. The tensors outlive the result. std::invalid_argument for a
// number out of range, and for a tensor of another size than the pager's of that number.
inline cpu::UpdateOrder checked_order(const std::vector<OptimTensor>& tensors, cpu::Pager* pager,
                                      Address numbers,  // int64 [tensors]
                                      int64_t budget_bytes) {
  const auto count = static_cast<int64_t>(tensors.size());
  if (pager == nullptr) {
    return {};
  }
  const int64_t* number = pointer<const int64_t>(numbers, count, "numbers");
  const auto known = static_cast<int64_t>(pager->numel().size());
  std::vector<bool> is_given(static_cast<size_t>(known));
  for (int64_t i = 0; i < count; ++i) {
    if (number[i] < -1 || number[i] >= known) {
      require(false, "number " + std::to_string(i) + " is " + std::to_string(number[i]) + ": expected -1, or 0 to " +
                         std::to_string(known - 1) + ".");
    }
    if (number[i] >= 0 && is_given[static_cast<size_t>(number[i])]) {
      require(false, "number " + std::to_string(i) + " is " + std::to_string(number[i]) +
                         ", which an earlier tensor has: expected each once.");
    }
    if (number[i] >= 0) {
      is_given[static_cast<size_t>(number[i])] = true;
    }
    const int64_t numel = tensors[static_cast<size_t>(i)].numel;
    if (number[i] >= 0 && pager->numel()[static_cast<size_t>(number[i])] != numel) {
      require(false, "tensor " + std::to_string(i) + " has " + std::to_string(numel) + " elements, but the pager's " +
                         std::to_string(pager->numel()[static_cast<size_t>(number[i])]) + ".");
    }
  }
  return [&tensors, count, pager, number, budget_bytes](const cpu::UpdateParts& update) {
    pager->step(tensors.data(), number, count, budget_bytes, update);
  };
}

}  // namespace qlora_native::python
