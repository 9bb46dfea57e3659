#include "cuda_on_cpu/launch.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/async_copy.h"
#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/context.h"
#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/scheduler.h"
#include "cuda_on_cpu/streams.h"

namespace cuemu {
namespace {

std::vector<Launch> launches;
uint64_t begun = 0;

cudaError_t check(const Launch& launch) {
  const dim3& grid = launch.grid;
  const dim3& block = launch.block;
  if (!has_image_for(device().sm)) {
    return cudaErrorNoKernelImageForDevice;
  }
  if (exists(launch.stream) && device_of_stream(launch.stream) != current_device()) {
    return cudaErrorInvalidResourceHandle;
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      block.x < 1 || block.y < 1 || block.z < 1 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      block.x * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const bool fits = launch.shared_bytes <= std::max(kSharedWithoutOptIn, opted_in_bytes(launch.kernel)) &&
                    launch.shared_bytes <= device().shared_bytes_per_block;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t run(const Launch& launch, size_t num_parameter_bytes, const std::function<void()>& thread_body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (is_broken(launch.ordinal)) {
    return cudaSuccess;  // the context's error tells
  }
  const WithCurrentDevice on(launch.ordinal);
  launches.push_back(launch);
  launches.back().parameters.reset();
  ++begun;
  forget_copies();
  enter(Toucher::kDevice);
  begin_addresses(launch.ordinal, launch.parameters.get(), num_parameter_bytes, &thread_body, sizeof(thread_body));
  bool ran = run_grid({launch.grid, launch.block, launch.shared_bytes}, thread_body);
  enter(Toucher::kInspector);
  for (std::string wrong : {overwritten_red_zone(), leave()}) {
    if (!wrong.empty()) {
      add_report(std::move(wrong));
      ran = false;
    }
  }
  return keep_error(launch.ordinal, ran ? cudaSuccess : block.failure);
}

}  // namespace

size_t& opted_in_bytes(const void* kernel) {
  static std::map<std::pair<int, const void*>, size_t> all;
  return all[{current_device(), kernel}];
}

cudaError_t launch(Launch launch, size_t num_parameter_bytes, std::function<void()> thread_body) {
  if (const cudaError_t error = standing_error(); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = check(launch); error != cudaSuccess) {
    return error;
  }
  launch.ordinal = current_device();
  return submit(launch.stream, [launch, num_parameter_bytes, body = std::move(thread_body)] {
    return run(launch, num_parameter_bytes, body);
  });
}

uint64_t launches_begun() { return begun; }

std::vector<Launch> take_launches() { return std::exchange(launches, {}); }

}  // namespace cuemu
