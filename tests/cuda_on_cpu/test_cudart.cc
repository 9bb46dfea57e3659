// The runtime stub: allocations, streams, events, graphs and managed memory, as the CUDA runtime's manual has them.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/harness.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/sanitizers.h"

using namespace qlora_native;

namespace {

constexpr cudaMemLocation kOnDevice{cudaMemLocationTypeDevice, 0};
constexpr cudaMemLocation kOnHost{cudaMemLocationTypeHost, 0};

__global__ void add(float* x, float what) { x[threadIdx.x] += what; }

TEST(memory_is_allocated_copied_and_freed) {
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, 1000) == cudaSuccess && reinterpret_cast<uintptr_t>(memory) % 256 == 0, "%p", memory);
  const std::vector<char> in(1000, 'x');
  std::vector<char> out(1000);
  CHECK(cudaMemcpy(memory, in.data(), 1000, cudaMemcpyHostToDevice) == cudaSuccess, "there");
  CHECK(cudaMemset(memory, 'y', 10) == cudaSuccess, "memset");
  CHECK(cudaMemcpy(out.data(), memory, 1000, cudaMemcpyDeviceToHost) == cudaSuccess, "back");
  CHECK(out[9] == 'y' && out[10] == 'x' && out[999] == 'x', "bytes");
  cudaPointerAttributes attributes{};
  CHECK(cudaPointerGetAttributes(&attributes, static_cast<char*>(memory) + 999) == cudaSuccess, "attributes");
  CHECK(attributes.type == cudaMemoryTypeDevice, "type %d", attributes.type);
  CHECK(cudaPointerGetAttributes(&attributes, in.data()) == cudaSuccess, "attributes");
  CHECK(attributes.type == cudaMemoryTypeUnregistered, "type %d", attributes.type);
  CHECK(cudaFree(memory) == cudaSuccess && cudaFree(nullptr) == cudaSuccess, "freed");
  CHECK(cudaFree(memory) == cudaErrorInvalidValue, "freed twice");
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess, "reported once");
}

TEST(pinned_memory_is_known_until_it_is_freed) {
  const auto type_of = [](const void* address) {
    cudaPointerAttributes attributes{};
    CHECK(cudaPointerGetAttributes(&attributes, address) == cudaSuccess, "attributes");
    return attributes.type;
  };
  void* memory = nullptr;
  CHECK(cudaMallocHost(&memory, 100) == cudaSuccess, "pinned");
  CHECK(type_of(static_cast<char*>(memory) + 99) == cudaMemoryTypeHost, "type %d", type_of(memory));
  CHECK(cudaFree(memory) == cudaErrorInvalidValue, "freed as the device's");
  CHECK(cudaFreeHost(memory) == cudaSuccess && cudaFreeHost(memory) == cudaErrorInvalidValue, "freed once");
  CHECK(type_of(memory) == cudaMemoryTypeUnregistered, "type %d", type_of(memory));
#if !defined(CUEMU_ASAN)  // whose malloc would end the process
  CHECK(cudaMallocHost(&memory, SIZE_MAX / 2) == cudaErrorMemoryAllocation, "more than there is");
  CHECK(type_of(&memory) == cudaMemoryTypeUnregistered, "type %d", type_of(&memory));
#endif
  (void)cudaGetLastError();
}

TEST(device_memory_runs_out) {
  void* memory = nullptr;
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  CHECK(cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess && free_bytes == total_bytes, "%zu", free_bytes);
  CHECK(cudaMalloc(&memory, total_bytes + 1) == cudaErrorMemoryAllocation && memory == nullptr, "too much");
  CHECK(std::strcmp(cudaGetErrorString(cudaGetLastError()), "out of memory") == 0, "words");
  const cuemu::DeviceBuffer<char> taken(4096);
  CHECK(cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess && free_bytes == total_bytes - 4096, "%zu",
        free_bytes);
}

TEST(device_says_what_it_is) {
  for (const int sm : {75, 80, 86, 89, 90, 100, 120}) {
    const cuemu::WithDevice played(sm);
    cudaDeviceProp properties{};
    CHECK(cudaGetDeviceProperties(&properties, 0) == cudaSuccess, "properties");
    int major = 0;
    int minor = 0;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess, "major");
    CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess, "minor");
    CHECK(major * 10 + minor == sm && properties.major == major && properties.minor == minor, "%d.%d", major, minor);
    CHECK(properties.sharedMemPerBlockOptin == cuemu::device().shared_bytes_per_block, "shared memory");
  }
  int count = 0;
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 1, "%d devices", count);
  CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice, "device 1");
}

TEST(streams_and_events) {
  cudaStream_t stream = nullptr;
  cudaEvent_t start = nullptr;
  cudaEvent_t end = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "a stream");
  CHECK(cudaEventCreate(&start) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess, "events");
  const cuemu::DeviceBuffer<float> x(std::vector<float>(32));
  CHECK(cudaEventRecord(start, stream) == cudaSuccess, "start");
  cuemu::take_launches();
  CHECK_LAUNCH(wp::launch(add, dim3(1), dim3(32), 0, stream, x.data(), 1.0f));
  CHECK(cudaEventRecord(end, stream) == cudaSuccess && cudaEventSynchronize(end) == cudaSuccess, "end");
  float milliseconds = -1.0f;
  CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaSuccess && milliseconds >= 0.0f, "time");
  CHECK(cudaStreamWaitEvent(nullptr, end, 0) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess, "wait");
  const std::vector<cuemu::Launch> launches = cuemu::take_launches();
  CHECK(launches.size() == 1 && launches[0].stream == stream && launches[0].block.x == 32, "the launch");
  CHECK(x.host()[31] == 1.0f, "its work");
  CHECK(cudaEventDestroy(start) == cudaSuccess && cudaEventDestroy(end) == cudaSuccess, "events go");
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "the stream goes");
  CHECK(wp::launch(add, dim3(1), dim3(32), 0, stream, x.data(), 1.0f) == cudaErrorInvalidResourceHandle, "it is gone");
}

TEST(a_graph_keeps_launches_for_later) {
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess, "a stream");
  const cuemu::DeviceBuffer<float> x(std::vector<float>(32));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "begin");
  CHECK_LAUNCH(wp::launch(add, dim3(1), dim3(32), 0, stream, x.data(), 1.0f));
  CHECK(cudaMemsetAsync(x.data(), 0, 4, stream) == cudaSuccess, "memset");
  CHECK_LAUNCH(wp::launch(add, dim3(1), dim3(32), 0, stream, x.data(), 2.0f));
  CHECK(x.host()[0] == 0.0f, "nothing has run");
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "end");
  size_t nodes = 0;
  CHECK(cudaGraphGetNodes(graph, nullptr, &nodes) == cudaSuccess && nodes == 3, "%zu nodes", nodes);
  cudaGraphExec_t executable = nullptr;
  CHECK(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess, "instantiate");
  for (int i = 1; i <= 3; ++i) {
    CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess, "replay");
    CHECK(x.host()[0] == 2.0f && x.host()[1] == 3.0f * static_cast<float>(i), "after %d replays", i);
  }
  CHECK(cudaGraphExecDestroy(executable) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess, "graphs go");
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "the stream goes");
  (void)cudaGetLastError();
}

TEST(managed_memory_moves_as_it_is_asked_to) {
  using cuemu::kManagedPage;
  void* memory = nullptr;
  const size_t num_bytes = 4 * kManagedPage + 1;
  CHECK(cudaMallocManaged(&memory, num_bytes, cudaMemAttachGlobal) == cudaSuccess, "allocated");
  CHECK(cuemu::residency(memory).device_bytes == 0 && cuemu::residency(memory).host_bytes == 0, "untouched");
  cuemu::take_managed_calls();
  CHECK(cudaMemAdvise(memory, num_bytes, cudaMemAdviseSetPreferredLocation, kOnHost) == cudaSuccess, "advice");
  CHECK(cudaMemPrefetchAsync(memory, num_bytes, kOnDevice, 0, nullptr) == cudaSuccess, "to the device");
  CHECK(cuemu::residency(memory).device_bytes == 5 * kManagedPage, "%zu", cuemu::residency(memory).device_bytes);
  CHECK(cudaMemPrefetchAsync(static_cast<char*>(memory) + kManagedPage, 1, kOnHost, 0, nullptr) == cudaSuccess, "back");
  CHECK(cuemu::residency(memory).host_bytes == kManagedPage, "%zu", cuemu::residency(memory).host_bytes);
  const std::vector<cuemu::ManagedCall> calls = cuemu::take_managed_calls();
  CHECK(calls.size() == 3 && calls[0].kind == cuemu::ManagedCall::Kind::kAdvise && !calls[0].to_device &&
            calls[1].to_device && calls[1].num_bytes == num_bytes && calls[2].num_bytes == 1,
        "%zu calls", calls.size());
  CHECK(cudaMemPrefetchAsync(memory, num_bytes + 1, kOnDevice, 0, nullptr) == cudaErrorInvalidValue, "past the end");
  CHECK(cudaMemPrefetchAsync(&memory, 1, kOnDevice, 0, nullptr) == cudaErrorInvalidValue, "not managed");
  CHECK(cudaMemPrefetchAsync(memory, 1, {cudaMemLocationTypeDevice, 1}, 0, nullptr) == cudaErrorInvalidValue,
        "no such device");
  CHECK(cudaFree(memory) == cudaSuccess && cuemu::managed_bytes_on_device() == 0, "freed");
  (void)cudaGetLastError();
}

TEST(managed_memory_gives_way_to_allocations) {
  using cuemu::kManagedPage;
  const cuemu::WithDevice small(80);
  cuemu::device().total_bytes = 10 * kManagedPage;
  void* state = nullptr;
  CHECK(cudaMallocManaged(&state, 20 * kManagedPage, cudaMemAttachGlobal) == cudaSuccess, "more than the device has");
  CHECK(cudaMemPrefetchAsync(state, 20 * kManagedPage, kOnDevice, 0, nullptr) == cudaSuccess, "prefetched");
  CHECK(cuemu::residency(state).device_bytes == 10 * kManagedPage, "%zu", cuemu::residency(state).device_bytes);
  (void)cuemu::take_managed_counters();
  void* spike = nullptr;
  CHECK(cudaMalloc(&spike, 7 * kManagedPage) == cudaSuccess, "a spike is no failure");
  CHECK(cuemu::take_managed_counters().evicted == 7, "evicted");
  CHECK(cuemu::residency(state).device_bytes == 3 * kManagedPage, "%zu", cuemu::residency(state).device_bytes);
  CHECK(cudaFree(spike) == cudaSuccess && cudaFree(state) == cudaSuccess, "freed");
}

TEST(managed_memory_without_concurrent_access) {
  const cuemu::WithDevice windows(86);
  cuemu::device().concurrent_managed_access = false;
  int concurrent = 1;
  CHECK(cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, 0) == cudaSuccess, "attribute");
  CHECK(concurrent == 0, "%d", concurrent);
  void* memory = nullptr;
  CHECK(cudaMallocManaged(&memory, 100, cudaMemAttachGlobal) == cudaSuccess, "allocated");
  CHECK(cudaMemPrefetchAsync(memory, 100, kOnDevice, 0, nullptr) == cudaErrorInvalidDevice, "no prefetch");
  CHECK(cudaFree(memory) == cudaSuccess && cudaGetLastError() == cudaErrorInvalidDevice, "freed");
}

}  // namespace
