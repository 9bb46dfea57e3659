#include "cuda_on_cpu/launch.h"

#include <mutex>
#include <string>
#include <utility>

#include "cuda_on_cpu/async_copy.h"
#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/scheduler.h"

namespace cuemu {
namespace {

std::vector<Launch> launches;
uint64_t begun = 0;

bool fits(const Launch& launch) {
  const dim3& grid = launch.grid;
  const dim3& block = launch.block;
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
         block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         block.x * block.y * block.z <= 1024 && launch.shared_bytes <= device().shared_bytes_per_block;
}

cudaError_t run(const Launch& launch, const std::function<void()>& thread_body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  launches.push_back(launch);
  ++begun;
  forget_copies();
  enter(Toucher::kDevice);
  bool ran = run_grid({launch.grid, launch.block, launch.shared_bytes}, thread_body);
  enter(Toucher::kInspector);
  for (std::string wrong : {overwritten_red_zone(), leave()}) {
    if (!wrong.empty()) {
      add_report(std::move(wrong));
      ran = false;
    }
  }
  return ran ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

cudaError_t launch(const Launch& launch, std::function<void()> thread_body) {
  if (!fits(launch)) {
    return cudaErrorInvalidConfiguration;
  }
  return submit(launch.stream, [launch, body = std::move(thread_body)] { return run(launch, body); });
}

uint64_t launches_begun() { return begun; }

std::vector<Launch> take_launches() { return std::exchange(launches, {}); }

}  // namespace cuemu
