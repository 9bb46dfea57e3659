// Launches. When work runs is up to streams.h, unless its stream is being captured into a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
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

// Gives `work` to the stream, or to the graph that the stream is being captured into.
cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work);

// How many launches have run so far.
uint64_t launches_begun();

// Every launch that reached a stream since the last call, replays of graphs included.
std::vector<Launch> take_launches();

}  // namespace cuemu
