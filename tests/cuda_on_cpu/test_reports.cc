// What a report holds: file, line, who waits where, and what came before.
#include <string>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/harness.h"

using namespace qlora_native;

namespace {

std::string line(int number) { return "test_reports.cc:" + std::to_string(number); }

// The report of a launch that must fail.
template <typename... Parameters, typename... Arguments>
std::string report_of(void (*kernel)(Parameters...), unsigned threads, Arguments... arguments) {
  cuemu::print_reports(false);
  const cudaError_t error = wp::launch(kernel, dim3(1), dim3(threads), 1024, nullptr, arguments...);
  cuemu::print_reports(true);
  CHECK(error == cudaErrorLaunchFailure, "%s", cudaGetErrorString(error));
  return cuemu::take_reports();
}

#define CHECK_SAYS(report, words) \
  CHECK((report).find(words) != std::string::npos, "expected '%s' in: %s", std::string(words).c_str(), (report).c_str())

constexpr int kShuffleLine = __LINE__ + 4;
constexpr int kBarrierLine = __LINE__ + 5;
__global__ void deadlock() {
  if (threadIdx.x % 32 != 31) {
    (void)__shfl_sync(0xffffffffu, 1, 0);
  } else {
    __syncthreads();
  }
}

TEST(a_deadlock_lists_who_waits_where) {
  const std::string report = report_of(deadlock, 64u);
  CHECK_SAYS(report, "deadlock");
  CHECK_SAYS(report, "threads 0-30, 32-62 wait in __shfl_sync at ");
  CHECK_SAYS(report, line(kShuffleLine));
  CHECK_SAYS(report, "threads 31, 63 wait in __syncthreads at ");
  CHECK_SAYS(report, line(kBarrierLine));
}

constexpr int kStoreLine = __LINE__ + 3;
constexpr int kLoadLine = __LINE__ + 3;
__global__ void race() {
  wp::store_16(wp::dyn_smem<uint4>() + threadIdx.x, make_uint4(1, 2, 3, 4));
  (void)wp::load_16(wp::dyn_smem<uint4>() + (threadIdx.x + 1) % 64);
}

TEST(a_race_names_both_accesses) {
  const std::string report = report_of(race, 64u);
  CHECK_SAYS(report, "race");
  CHECK_SAYS(report, line(kStoreLine));
  CHECK_SAYS(report, line(kLoadLine));
  CHECK_SAYS(report, "thread ");
}

// Within a warp __syncwarp orders, between warps it does not.
__global__ void pass_on(int barrier) {
  uint4* shared = wp::dyn_smem<uint4>();
  const unsigned lane = threadIdx.x % 32;
  wp::store_16(shared + threadIdx.x, make_uint4(lane, 0, 0, 0));
  if (barrier != 0) {
    __syncwarp();
  } else {
    (void)__shfl_sync(0xffffffffu, lane, 0);
  }
  (void)wp::load_16(shared + (threadIdx.x & ~31u) + (lane + 1) % 32);
}

TEST(a_shuffle_orders_no_memory) {
  CHECK_SAYS(report_of(pass_on, 32u, 0), "race");
  cuemu::over_all_schedules(
      [](const char*) { CHECK_LAUNCH(wp::launch(pass_on, dim3(1), dim3(64), 1024, nullptr, 1)); });
}

// Bytes of one 16-byte slot that two threads write: no race as long as each has its own.
__global__ void share_a_slot(int overlap) {
  auto* bytes = wp::dyn_smem<unsigned>();
  atomicExch(bytes + threadIdx.x, 1u);
  __syncthreads();
  if (threadIdx.x == 0) {
    (void)wp::load_16(bytes);
  }
  if (overlap != 0) {
    atomicExch(bytes + threadIdx.x, 2u);
  } else if (threadIdx.x >= 4) {
    atomicExch(bytes + threadIdx.x, 2u);
  }
}

TEST(neighbors_in_a_slot_do_not_race) {
  cuemu::over_all_schedules(
      [](const char*) { CHECK_LAUNCH(wp::launch(share_a_slot, dim3(1), dim3(8), 1024, nullptr, 0)); });
  CHECK_SAYS(report_of(share_a_slot, 8u, 1), "race");
}

// Two readers of one warp and one of another: whoever writes next races with one of them.
__global__ void read_and_write(unsigned writer) {
  uint4* shared = wp::dyn_smem<uint4>();
  if (threadIdx.x == 0) {
    wp::store_16(shared, make_uint4(0, 0, 0, 0));
  }
  __syncthreads();
  if (threadIdx.x == 3 || threadIdx.x == 4 || threadIdx.x == 40) {
    (void)wp::load_16(shared);
  }
  if (threadIdx.x == writer) {
    wp::store_16(shared, make_uint4(1, 1, 1, 1));
  }
}

TEST(a_writer_races_with_any_reader) {
  for (const cuemu::Schedule& schedule : cuemu::all_schedules()) {
    cuemu::set_schedule(schedule);
    for (const unsigned writer : {3u, 4u, 40u, 63u}) {
      CHECK_SAYS(report_of(read_and_write, 64u, writer), "race");
    }
  }
  cuemu::set_schedule({});
}

// A copy whose source changes before it is waited for.
__global__ void change_source(float* x) {  // [4]
  wp::cp_async_16(wp::dyn_smem<float>(), x);
  wp::cp_async_commit();
  x[0] = 5.0f;
  wp::cp_async_wait<0>();
}

TEST(a_source_may_not_change_in_flight) {
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  CHECK_SAYS(report_of(change_source, 1u, x.data()), "its source changed");
}

__global__ void read_one(const float* x) { (void)__ldg(x); }

TEST(launches_go_on_after_a_report) {
  cuemu::over_all_schedules([](const char*) {
    CHECK_SAYS(report_of(deadlock, 64u), "deadlock");
    CHECK_SAYS(report_of(race, 64u), "race");
    const cuemu::DeviceBuffer<float> x(1);
    CHECK_LAUNCH(wp::launch(read_one, dim3(2), dim3(64), 0, nullptr, x.data()));
  });
}

}  // namespace
