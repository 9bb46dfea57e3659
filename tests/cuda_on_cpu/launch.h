// Launches. When work runs is up to streams.h, unless its stream is being captured into a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace cuemu {

struct Launch {
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
  std::shared_ptr<const void> parameters;  // the kernel's, as they were when it was launched
  int ordinal = 0;                         // of the device; launch() sets it
};

// Limits as a driver checks them, then submit(). A launch that ends in a report gives cudaErrorLaunchFailure,
// cudaErrorIllegalAddress or cudaErrorMisalignedAddress.
cudaError_t launch(Launch launch, size_t num_parameter_bytes, std::function<void()> thread_body);

// Bytes of dynamic shared memory that cudaFuncSetAttribute has allowed to the kernel on the current device.
size_t& opted_in_bytes(const void* kernel);

inline constexpr size_t kSharedWithoutOptIn = 48 * 1024;

// Gives `work` to the stream, or to the graph that the stream is being captured into.
cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work);

// How many launches have run so far.
uint64_t launches_begun();

// Every launch that reached a stream since the last call, replays of graphs included.
std::vector<Launch> take_launches();

}  // namespace cuemu
