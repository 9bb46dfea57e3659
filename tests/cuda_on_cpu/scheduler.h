// Runs a grid: its blocks one after the other, each block's threads as fibers in the order of the schedule.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <functional>

namespace cuemu {

struct Grid {
  dim3 grid;
  dim3 block;
  size_t dynamic_bytes;
};

// Calls `thread_body` once for every thread. False: a report was written, and the grid was left where it stood.
bool run_grid(const Grid& grid, const std::function<void()>& thread_body);

// Called when a barrier opens: the next stretch may run in another order.
void redraw_order();

}  // namespace cuemu
