// The table of a step that goes over a paged arena chunk by chunk: of each page chunk a launch's rows and work. A pure
// function of sizes and places.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/page_plan.h"
#include "cuda/tensor_list.h"

namespace qlora_native::cuda {

// A tensor within a page chunk: row `row` of the optimizer's own table, with these addresses for its states. They are
// those that element 0 would have; the launch touches the elements of the chunk alone.
struct PagedRow {
  int64_t row;
  uintptr_t exp_avg;
  uintptr_t exp_avg_sq;  // 0 for what the form does not have
  uintptr_t exp_avg_absmax;
  uintptr_t exp_avg_sq_absmax;
};

// What the launch for one page chunk is given: rows and chunks from these on.
struct PagedRun {
  int64_t first_row = 0;
  int64_t first_chunk = 0;
  int64_t num_chunks = 0;  // 0: there is nothing to update
};

struct PagedTable {
  std::vector<PagedRow> rows;      // of the runs, and then one of each tensor
  std::vector<OptimChunk> chunks;  // tensor: counted from the first row of its run
  std::vector<PagedRun> runs;      // of each page chunk
  int64_t first_counted = 0;       // row

  // The launch's table, given where rows and chunks lie on the device.
  OptimTable of(int64_t page_chunk, const OptimTensor* tensors,  // [rows], device
                const OptimChunk* optim_chunks) const {          // [chunks], device
    const PagedRun& run = runs[static_cast<size_t>(page_chunk)];
    return {tensors + run.first_row, optim_chunks + run.first_chunk, 0, run.num_chunks};
  }

  // The table of the launch that comes after all others and counts the step of every tensor. They cannot: the parts of
  // a tensor need its count as it was, and a walk takes them in any order.
  OptimTable counting(const OptimTensor* tensors) const {  // [rows], device
    return {tensors + first_counted, nullptr, static_cast<int64_t>(rows.size()) - first_counted, 0};
  }
};

// Where byte `offset` of the arena is while its page chunk is updated.
using AddressOf = std::function<uintptr_t(int64_t page_chunk, int64_t offset)>;

// row_of: the row that updates each tensor of the plan, -1 for those without a gradient.
PagedTable paged_table(const PagePlan& plan,
                       const std::vector<StateForm>& forms,  // of the plan's tensors
                       const std::vector<int64_t>& row_of,   // of the plan's tensors
                       const AddressOf& address_of);

}  // namespace qlora_native::cuda
