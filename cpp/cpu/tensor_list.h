// One loop over the blocks of many tensors, so that threads share the work evenly however it is cut into tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/optim.h"
#include "core/page_plan.h"
#include "core/state_code.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {

// The tensors as parts of themselves.
inline std::vector<StatePart> whole_parts(const OptimTensor* tensors,  // [num_tensors]
                                          int64_t num_tensors) {
  std::vector<StatePart> parts(static_cast<size_t>(num_tensors));
  for (int64_t i = 0; i < num_tensors; ++i) {
    parts[static_cast<size_t>(i)] = {i, 0, tensors[i].numel};
  }
  return parts;
}

// Calls body(tensor, first, last) for ranges of blocks of `block_size` elements that together cover every part; a part
// begins with a block.
template <typename Body>
void for_blocks_of_parts(const StatePart* parts,  // [num_parts]
                         int64_t num_parts, int64_t block_size, int64_t grain, const Body& body) {
  std::vector<int64_t> start(static_cast<size_t>(num_parts) + 1);  // number of the part's first block among all
  for (int64_t i = 0; i < num_parts; ++i) {
    start[static_cast<size_t>(i) + 1] =
        start[static_cast<size_t>(i)] + ceil_div(parts[i].end - parts[i].begin, block_size);
  }
  parallel_for(start.back(), grain, [&](int64_t begin, int64_t end) {
    auto part = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; ++part) {
      const int64_t last = std::min(end, start[static_cast<size_t>(part) + 1]);
      if (begin < last) {
        const int64_t shift = parts[part].begin / block_size - start[static_cast<size_t>(part)];
        body(parts[part].tensor, begin + shift, last + shift);
        begin = last;
      }
    }
  });
}

// Updates these parts of a step's tensors; `grain` blocks are worth a thread.
using UpdateParts = std::function<void(const StatePart* parts,  // [num_parts]
                                       int64_t num_parts, int64_t grain)>;
// The order in which a step's tensors are updated: calls `update` for runs of parts that together cover them once. An
// empty one is a single run.
using UpdateOrder = std::function<void(const UpdateParts& update)>;

inline constexpr int64_t kUpdateGrain = 32;
// In short runs between waits for a disk, threads that wait for each other cost more than they bring.
inline constexpr int64_t kPagedUpdateGrain = 1024;

inline void update_in_one_run(const OptimTensor* tensors,  // [num_tensors]
                              int64_t num_tensors, const UpdateParts& update) {
  const std::vector<StatePart> parts = whole_parts(tensors, num_tensors);
  update(parts.data(), num_tensors, kUpdateGrain);
}

inline void update_in(const UpdateOrder& order, const OptimTensor* tensors,  // [num_tensors]
                      int64_t num_tensors, const UpdateParts& update) {
  order ? order(update) : update_in_one_run(tensors, num_tensors, update);
}

}  // namespace qlora_native::cpu
