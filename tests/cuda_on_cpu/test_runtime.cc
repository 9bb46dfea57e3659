// The runtime's refusals: captures, a second device, shared memory without the opt-in, missing images, and errors that
// come late and stay. One mistake at a time, and the sound form of each.
#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/context.h"
#include "cuda_on_cpu/harness.h"
#include "cuda_on_cpu/sanitizers.h"

using namespace qlora_native;

namespace {

#define CHECK_IS(call, expected)                                                           \
  do {                                                                                     \
    const cudaError_t given = (call);                                                      \
    CHECK(given == (expected), "%s gives %s, expected %s", #call, cudaGetErrorName(given), \
          cudaGetErrorName(expected));                                                     \
    (void)cudaGetLastError();                                                              \
  } while (false)

// x -= rate, through the verbs that every build checks.
__global__ void step(float* x, float rate) { __stcg(x + threadIdx.x, __ldg(x + threadIdx.x) - rate); }

cudaError_t launch_step(float* x, float rate, cudaStream_t stream) {
  return wp::launch(step, dim3(1), dim3(4), 0, stream, x, rate);
}

struct Stream {
  Stream() { cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking); }
  ~Stream() { cudaStreamDestroy(handle); }
  operator cudaStream_t() const { return handle; }
  cudaStream_t handle = nullptr;
};

struct Event {
  Event() { cudaEventCreateWithFlags(&handle, cudaEventDisableTiming); }
  ~Event() { cudaEventDestroy(handle); }
  operator cudaEvent_t() const { return handle; }
  cudaEvent_t handle = nullptr;
};

void begin(cudaStream_t stream, cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
  CHECK_IS(cudaStreamBeginCapture(stream, mode), cudaSuccess);
}

// Ends a capture that one call has spoilt.
void check_invalidated(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CHECK_IS(cudaStreamIsCapturing(stream, &status), cudaSuccess);
  CHECK(status == cudaStreamCaptureStatusInvalidated, "status %d", static_cast<int>(status));
  const cuemu::DeviceBuffer<float> x(4);
  CHECK_IS(launch_step(x.data(), 1.0f, stream), cudaErrorStreamCaptureInvalidated);
  auto* graph = reinterpret_cast<cudaGraph_t>(1);
  CHECK_IS(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
  CHECK(graph == nullptr, "no graph");
}

// ---------------------------------------------------------------------------------------------------------------------
// Capture

TEST(a_graph_keeps_parameters_as_they_were) {
  const Stream stream;
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  float rate = 1.0f;
  begin(stream);
  CHECK_LAUNCH(launch_step(x.data(), rate, stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CHECK_IS(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  CHECK_IS(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  rate = 100.0f;  // too late
  for (int i = 0; i < 3; ++i) {
    CHECK_IS(cudaGraphLaunch(executable, stream), cudaSuccess);
  }
  CHECK(x.host()[0] == -3.0f, "%g", static_cast<double>(x.host()[0]));
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

// A capture spreads to a stream that waits for its events, and must be joined.
TEST(a_capture_takes_other_streams_in) {
  const Stream stream;
  const Stream other;
  const Event forked;
  const Event joined;
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  for (const bool joins : {true, false}) {
    begin(stream);
    CHECK_IS(cudaEventRecord(forked, stream), cudaSuccess);
    CHECK_IS(cudaStreamWaitEvent(other, forked, 0), cudaSuccess);
    CHECK_LAUNCH(launch_step(x.data(), 1.0f, other));
    CHECK_IS(cudaEventRecord(joined, other), cudaSuccess);
    if (joins) {
      CHECK_IS(cudaStreamWaitEvent(stream, joined, 0), cudaSuccess);
    }
    cudaGraph_t graph = nullptr;
    CHECK_IS(cudaStreamEndCapture(stream, &graph), joins ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
    size_t nodes = 0;
    CHECK(!joins || (cudaGraphGetNodes(graph, nullptr, &nodes) == cudaSuccess && nodes == 1), "%zu nodes", nodes);
    cudaGraphDestroy(graph);
  }
  CHECK(x.host()[0] == 0.0f, "nothing ran");
  CHECK_IS(cudaEventQuery(joined), cudaErrorCapturedEvent);
}

TEST(a_capture_may_not_wait_for_an_event_from_outside) {
  const Stream stream;
  const Stream other;
  const Event event;
  CHECK_IS(cudaEventRecord(event, other), cudaSuccess);
  begin(stream);
  CHECK_IS(cudaStreamWaitEvent(stream, event, 0), cudaErrorStreamCaptureIsolation);
  check_invalidated(stream);
}

// What waits, allocates or runs beside it spoils a capture, by its mode.
TEST(calls_that_spoil_a_capture) {
  const Stream stream;
  const Stream other;
  const Event inside;
  const Event outside;
  void* taken = nullptr;
  void* managed = nullptr;
  CHECK_IS(cudaMalloc(&taken, 16), cudaSuccess);
  CHECK_IS(cudaMallocManaged(&managed, 16, cudaMemAttachGlobal), cudaSuccess);
  struct Call {
    const char* name;
    std::function<cudaError_t()> make;
    cudaError_t global, relaxed;
  };
  constexpr cudaError_t kUnsupported = cudaErrorStreamCaptureUnsupported;
  const auto allocate = [](auto take, auto release) {
    void* memory = nullptr;
    const cudaError_t error = take(&memory);
    release(memory);
    return error;
  };
  size_t free_bytes = 0, all_bytes = 0;
  const Call calls[] = {
      {"cudaMalloc", [&] { return allocate([](void** at) { return cudaMalloc(at, 1); }, cudaFree); }, kUnsupported,
       cudaSuccess},
      {"cudaHostAlloc", [&] { return allocate([](void** at) { return cudaHostAlloc(at, 1, 0); }, cudaFreeHost); },
       kUnsupported, cudaSuccess},
      {"cudaStreamSynchronize", [&] { return cudaStreamSynchronize(stream); }, kUnsupported, kUnsupported},
      {"cudaStreamSynchronize of another", [&] { return cudaStreamSynchronize(other); }, kUnsupported, cudaSuccess},
      {"cudaStreamQuery", [&] { return cudaStreamQuery(stream); }, kUnsupported, kUnsupported},
      {"cudaDeviceSynchronize", cudaDeviceSynchronize, kUnsupported, kUnsupported},
      {"cudaEventQuery of a captured one", [&] { return cudaEventQuery(inside); }, cudaErrorCapturedEvent,
       cudaErrorCapturedEvent},
      {"cudaEventSynchronize", [&] { return cudaEventSynchronize(outside); }, kUnsupported, cudaSuccess},
      {"the default stream", [&] { return cudaMemsetAsync(taken, 0, 16, nullptr); }, cudaErrorStreamCaptureImplicit,
       cudaErrorStreamCaptureImplicit},
      {"cudaMemPrefetchAsync",
       [&] { return cudaMemPrefetchAsync(managed, 16, {cudaMemLocationTypeDevice, 0}, 0, stream); }, kUnsupported,
       kUnsupported},
      {"cudaMemGetInfo", [&] { return cudaMemGetInfo(&free_bytes, &all_bytes); }, cudaSuccess, cudaSuccess},
      {"cudaMemsetAsync", [&] { return cudaMemsetAsync(taken, 0, 16, stream); }, cudaSuccess, cudaSuccess},
  };
  CHECK_IS(cudaEventRecord(outside, other), cudaSuccess);
  for (const Call& call : calls) {
    for (const bool relaxed : {false, true}) {
      begin(stream, relaxed ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal);
      CHECK_IS(cudaEventRecord(inside, stream), cudaSuccess);
      const cudaError_t expected = relaxed ? call.relaxed : call.global;
      const cudaError_t got = call.make();
      CHECK(got == expected, "%s, relaxed %d: %s, expected %s", call.name, relaxed, cudaGetErrorName(got),
            cudaGetErrorName(expected));
      (void)cudaGetLastError();
      if (expected != cudaSuccess) {
        check_invalidated(stream);
      } else {
        cudaGraph_t graph = nullptr;
        CHECK_IS(cudaStreamEndCapture(stream, &graph), cudaSuccess);
        cudaGraphDestroy(graph);
      }
    }
  }
  cudaFree(taken);
  cudaFree(managed);
}

// As torch's allocator does to get memory in the middle of a capture.
TEST(a_thread_may_relax_its_mode_for_a_call) {
  const Stream stream;
  begin(stream);
  auto mode = cudaStreamCaptureModeRelaxed;
  CHECK_IS(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
  void* memory = nullptr;
  CHECK_IS(cudaMalloc(&memory, 16), cudaSuccess);
  CHECK_IS(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
  cudaGraph_t graph = nullptr;
  CHECK_IS(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  cudaFree(memory);
}

#if !defined(CUEMU_ASAN)  // which would end the process
TEST(a_graph_that_reads_freed_memory_is_reported) {
  const Stream stream;
  void* memory = nullptr;
  CHECK_IS(cudaMalloc(&memory, 16), cudaSuccess);
  begin(stream);
  CHECK_LAUNCH(launch_step(static_cast<float*>(memory), 1.0f, stream));
  CHECK_IS(cudaMemsetAsync(memory, 0, 16, stream), cudaSuccess);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CHECK_IS(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  CHECK_IS(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  CHECK_IS(cudaGraphLaunch(executable, stream), cudaSuccess);
  CHECK_IS(cudaFree(memory), cudaSuccess);
  cuemu::print_reports(false);
  CHECK_IS(cudaGraphLaunch(executable, stream), cudaErrorIllegalAddress);
  cuemu::print_reports(true);
  const std::string report = cuemu::take_reports();
  CHECK(report.find("byte 0 of 16 bytes of memory that cudaFree has taken back") != std::string::npos, "%s",
        report.c_str());
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// A second device

class WithTwoDevices {
 public:
  WithTwoDevices() { cuemu::set_num_devices(2); }
  ~WithTwoDevices() { cuemu::set_num_devices(1); }
};

TEST(streams_and_events_belong_to_a_device) {
  const WithTwoDevices two;
  int count = 0;
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 2, "%d devices", count);
  CHECK_IS(cudaSetDevice(2), cudaErrorInvalidDevice);
  const Stream here;
  const Event mine;
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  CHECK_IS(cudaSetDevice(1), cudaSuccess);
  const Stream there;
  const Event other;
  CHECK_IS(launch_step(x.data(), 1.0f, here), cudaErrorInvalidResourceHandle);
  CHECK_IS(cudaEventRecord(mine, there), cudaErrorInvalidResourceHandle);
  CHECK_IS(cudaEventRecord(other, there), cudaSuccess);
  CHECK_IS(cudaStreamWaitEvent(here, other, 0), cudaSuccess);  // across devices
  CHECK_IS(cudaSetDevice(0), cudaSuccess);
  CHECK_IS(launch_step(x.data(), 1.0f, here), cudaSuccess);
  CHECK_IS(launch_step(x.data(), 1.0f, there), cudaErrorInvalidResourceHandle);
  CHECK(x.host()[0] == -1.0f, "one ran");
}

TEST(memory_belongs_to_a_device) {
  const WithTwoDevices two;
  CHECK_IS(cudaSetDevice(1), cudaSuccess);
  void* memory = nullptr;
  CHECK_IS(cudaMalloc(&memory, 4096), cudaSuccess);
  CHECK_IS(cudaMemset(memory, 0, 4096), cudaSuccess);
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  CHECK(cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess && free_bytes + 4096 == total_bytes, "on 1");
  CHECK_IS(cudaSetDevice(0), cudaSuccess);
  CHECK(cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess && free_bytes == total_bytes, "on 0");
  cudaPointerAttributes attributes{};
  CHECK(cudaPointerGetAttributes(&attributes, memory) == cudaSuccess && attributes.device == 1, "its device");
  cuemu::print_reports(false);
  CHECK_IS(launch_step(static_cast<float*>(memory), 1.0f, nullptr), cudaErrorIllegalAddress);
  cuemu::print_reports(true);
  const std::string report = cuemu::take_reports();
  CHECK(report.find("memory of device 1, by a kernel of device 0 without peer access") != std::string::npos, "%s",
        report.c_str());
  CHECK_IS(cudaDeviceEnablePeerAccess(1, 0), cudaSuccess);
  CHECK_IS(cudaDeviceEnablePeerAccess(1, 0), cudaErrorPeerAccessAlreadyEnabled);
  CHECK_IS(launch_step(static_cast<float*>(memory), 1.0f, nullptr), cudaSuccess);
  CHECK_IS(cudaFree(memory), cudaSuccess);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory, images, errors

TEST(shared_memory_above_48_kib_must_be_asked_for) {
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  const auto launch = [&](size_t shared_bytes) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(4);
    config.dynamicSmemBytes = shared_bytes;
    return wp::launch_configured<float*, float>(config, step, x.data(), 1.0f);
  };
  const auto* kernel = reinterpret_cast<const void*>(step);
  const auto most = static_cast<int>(cuemu::device().shared_bytes_per_block);
  constexpr auto kBytes = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK_IS(launch(48 * 1024), cudaSuccess);
  CHECK_IS(launch(48 * 1024 + 1), cudaErrorInvalidValue);
  CHECK_IS(cudaFuncSetAttribute(kernel, kBytes, most + 1), cudaErrorInvalidValue);
  CHECK_IS(cudaFuncSetAttribute(kernel, kBytes, 50 * 1024), cudaSuccess);
  CHECK_IS(launch(50 * 1024), cudaSuccess);
  CHECK_IS(launch(50 * 1024 + 1), cudaErrorInvalidValue);
  CHECK_IS(cudaFuncSetAttribute(kernel, kBytes, 0), cudaSuccess);
}

// Of two threads that launch one kernel, the one that needs less must not take from the other what it has asked for.
TEST(shared_memory_is_asked_for_once_and_to_the_most) {
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  const auto launch = [&](size_t shared_bytes) {
    return wp::launch(step, dim3(1), dim3(4), shared_bytes, nullptr, x.data(), 1.0f);
  };
  size_t& allowed = cuemu::opted_in_bytes(reinterpret_cast<const void*>(step));
  const size_t most = cuemu::device().shared_bytes_per_block;
  CHECK_IS(launch(50 * 1024), cudaSuccess);
  CHECK(allowed == most, "%zu bytes of %zu", allowed, most);
  allowed = 60 * 1024;
  CHECK_IS(launch(50 * 1024), cudaSuccess);
  CHECK(allowed == 60 * 1024, "%zu bytes", allowed);
  allowed = most;
  CHECK_IS(launch(most + 1), cudaErrorInvalidValue);
}

TEST(a_device_needs_an_image) {
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  cuemu::images() = cuemu::Images{{75, 80, 90}, {}};
  for (const auto& [sm, runs] : {std::pair{70, false},
                                 {75, true},
                                 {80, true},
                                 {86, true},
                                 {87, true},
                                 {89, true},
                                 {90, true},
                                 {100, false},
                                 {110, false},
                                 {120, false}}) {
    const cuemu::WithDevice played(sm);
    CHECK_IS(launch_step(x.data(), 1.0f, nullptr), runs ? cudaSuccess : cudaErrorNoKernelImageForDevice);
  }
  cuemu::images() = cuemu::Images{{80}, {90}};
  for (const auto& [sm, runs] : {std::pair{75, false}, {86, true}, {90, true}, {100, true}, {121, true}}) {
    const cuemu::WithDevice played(sm);
    CHECK_IS(launch_step(x.data(), 1.0f, nullptr), runs ? cudaSuccess : cudaErrorNoKernelImageForDevice);
  }
  cuemu::images() = std::nullopt;
}

TEST(an_error_comes_late_and_stays) {
  cuemu::set_sticky_errors(true);
  cuemu::print_reports(false);
  const Stream stream;
  const cuemu::DeviceBuffer<float> x(std::vector<float>(4));
  CHECK_IS(launch_step(x.data() + 1, 1.0f, stream), cudaSuccess);  // past the end
  CHECK_IS(launch_step(x.data(), 1.0f, stream), cudaSuccess);      // nobody knows yet
  void* memory = nullptr;
  CHECK(cudaStreamSynchronize(stream) == cudaErrorIllegalAddress, "from what waits");
  CHECK(cudaMalloc(&memory, 4) == cudaErrorIllegalAddress, "from every call");
  CHECK(launch_step(x.data(), 1.0f, stream) == cudaErrorIllegalAddress, "launches, too");
  CHECK(cudaGetLastError() == cudaErrorIllegalAddress && cudaGetLastError() == cudaErrorIllegalAddress, "for good");
  CHECK(x.host()[0] == 0.0f, "nothing runs any more");
  CHECK(cudaDeviceReset() == cudaSuccess, "until the device is reset");
  CHECK_IS(launch_step(x.data(), 1.0f, stream), cudaSuccess);
  CHECK_IS(cudaStreamSynchronize(stream), cudaSuccess);
  CHECK(x.host()[0] == -1.0f, "and then again");
  CHECK(!cuemu::take_reports().empty(), "reported");
  cuemu::print_reports(true);
  cuemu::set_sticky_errors(false);
}

}  // namespace
