// One loop over the blocks of many tensors, so that threads share the work evenly however it is cut into tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/optim.h"
#include "core/state_code.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {

// Calls body(tensor, first, last) for ranges of blocks of `block_size` elements that together cover every tensor;
// `numel(i)` gives the size of tensor i.
template <typename Numel, typename Body>
void for_blocks_of_tensors(int64_t num_tensors, int64_t block_size, int64_t grain, const Numel& numel,
                           const Body& body) {
  std::vector<int64_t> start(static_cast<size_t>(num_tensors) + 1);  // number of the tensor's first block among all
  for (int64_t i = 0; i < num_tensors; ++i) {
    start[static_cast<size_t>(i) + 1] = start[static_cast<size_t>(i)] + (numel(i) + block_size - 1) / block_size;
  }
  parallel_for(start.back(), grain, [&](int64_t begin, int64_t end) {
    auto tensor = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; ++tensor) {
      const int64_t last = std::min(end, start[static_cast<size_t>(tensor) + 1]);
      if (begin < last) {
        body(tensor, begin - start[static_cast<size_t>(tensor)], last - start[static_cast<size_t>(tensor)]);
        begin = last;
      }
    }
  });
}

}  // namespace qlora_native::cpu
