// Streams, and when their work runs. At once, in the order of the calls; or late: nothing runs until something waits
// for it, and then streams take turns by ranks drawn from a seed, each as far ahead of the others as the events that it
// waits for let it. Work that is not ordered by a stream or an event then runs in the wrong order under some seed.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace cuemu {

struct StreamOrder {
  bool is_late;
  uint64_t seed;
};

// At once, and late under twelve seeds.
const std::vector<StreamOrder>& all_stream_orders();

// What is queued runs first.
void set_stream_order(StreamOrder order);

// Work that has been given to a stream.
struct Task {
  bool is_done = false;
  std::chrono::steady_clock::time_point ended{};
};
using TaskRef = std::shared_ptr<Task>;

cudaStream_t make_stream(bool waits_for_default);  // of the current device
bool exists(cudaStream_t stream);                  // the default ones do
bool is_default(cudaStream_t stream);              // by any of its names: the current device's
int device_of_stream(cudaStream_t stream);
void destroy(cudaStream_t stream);  // after its work

// Runs `work` now or later, after what the stream holds and after `also`; null if it ran at once.
cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work, TaskRef also, TaskRef& task);

// Returns once it is done; the first error of anything that ran for it.
cudaError_t finish(cudaStream_t stream);
cudaError_t finish(const TaskRef& task);
cudaError_t finish_all();  // of every device

size_t num_queued();
size_t num_queued(cudaStream_t stream);

}  // namespace cuemu
