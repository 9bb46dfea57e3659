// Launches. Work runs at once, in the order of the calls, unless its stream is being captured into a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <vector>

namespace cuemu {

struct Launch {
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Limits as a driver checks them, then submit(). A launch that ends in a report gives cudaErrorLaunchFailure.
cudaError_t launch(const Launch& launch, std::function<void()> thread_body);

// Runs `work` now, or keeps it for the graph that `stream` is being captured into.
cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work);

// Every launch that reached a stream since the last call, replays of graphs included.
std::vector<Launch> take_launches();

}  // namespace cuemu
