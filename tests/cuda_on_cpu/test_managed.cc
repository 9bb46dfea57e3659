// The emulator's account of managed memory and of streams: exact counts of small kernels, and a step over a paged
// arena, sound and with one defect at a time.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/harness.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/sanitizers.h"

using namespace qlora_native;
using cuemu::kManagedPage;
using cuemu::ManagedCounters;

namespace {

constexpr cudaMemLocation kOnDevice{cudaMemLocationTypeDevice, 0};
constexpr cudaMemLocation kOnHost{cudaMemLocationTypeHost, 0};
constexpr size_t kPageFloats = kManagedPage / sizeof(float);

// One element of each of `count` pages.
__global__ void add_to_pages(float* x, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    x[static_cast<size_t>(i) * kPageFloats] += 1.0f;
  }
}

cudaError_t launch_add(float* x, size_t pages, cudaStream_t stream) {
  return wp::launch(add_to_pages, dim3(1), dim3(32), 0, stream, x, static_cast<int>(pages));
}

class Managed {
 public:
  explicit Managed(size_t pages) : pages_(pages) {
    CHECK(cudaMallocManaged(&memory_, pages * kManagedPage, cudaMemAttachGlobal) == cudaSuccess, "%zu pages", pages);
  }
  Managed(const Managed&) = delete;
  Managed& operator=(const Managed&) = delete;
  ~Managed() {
    if (memory_ != nullptr) {
      CHECK(cudaFree(memory_) == cudaSuccess, "freed");
    }
  }

  float* page(size_t number) const { return static_cast<float*>(memory_) + number * kPageFloats; }
  void* forget() { return std::exchange(memory_, nullptr); }

  void zero() const {  // from the host
    std::memset(memory_, 0, pages_ * kManagedPage);
    (void)cuemu::take_managed_counters();
  }

  void prefetch(size_t first, size_t pages, bool to_device, cudaStream_t stream) const {
    const cudaError_t error =
        cudaMemPrefetchAsync(page(first), pages * kManagedPage, to_device ? kOnDevice : kOnHost, 0, stream);
    CHECK(error == cudaSuccess, "%s", cudaGetErrorString(error));
  }

 private:
  size_t pages_;
  void* memory_ = nullptr;
};

#define CHECK_COUNTS(...)                                                                                           \
  do {                                                                                                              \
    const ManagedCounters expected{__VA_ARGS__};                                                                    \
    const ManagedCounters got = cuemu::take_managed_counters();                                                     \
    CHECK(got == expected,                                                                                          \
          "device faults %d, remote %d, host faults %d, to device %d, to host %d, evicted %d, idle %d, most %d %d", \
          (int)got.device_faults, (int)got.remote_accesses, (int)got.host_faults, (int)got.to_device,               \
          (int)got.to_host, (int)got.evicted, (int)got.idle_prefetches, (int)got.most_to_device,                    \
          (int)got.most_to_host);                                                                                   \
  } while (false)

TEST(a_kernel_faults_once_for_each_page_that_it_touches) {
  const Managed memory(5);
  memory.zero();
  CHECK_LAUNCH(launch_add(memory.page(1), 3, nullptr));
  CHECK_COUNTS(.device_faults = 3, .to_device = 3, .most_to_device = 1);
  CHECK_LAUNCH(launch_add(memory.page(0), 5, nullptr));
  CHECK_COUNTS(.device_faults = 2, .to_device = 2, .most_to_device = 1);
  CHECK(cuemu::residency(memory.page(0)).device_bytes == 5 * kManagedPage, "all there");
  CHECK_LAUNCH(launch_add(memory.page(0), 5, nullptr));
  CHECK_COUNTS();
}

TEST(the_host_faults_once_for_each_page_on_the_device) {
  const Managed memory(4);
  CHECK_LAUNCH(launch_add(memory.page(0), 3, nullptr));  // the fourth was never touched
  CHECK_COUNTS(.device_faults = 3, .to_device = 3, .most_to_device = 1);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    for (size_t i = 1; i < 4; ++i) {
      sum += memory.page(i)[7];
    }
  }
  CHECK(sum != 0.0f, "what nobody wrote is NaN");
  CHECK_COUNTS(.host_faults = 2, .to_host = 2, .most_to_host = 1);
}

TEST(a_prefetch_saves_the_faults) {
  const Managed memory(4);
  memory.zero();
  memory.prefetch(0, 4, true, nullptr);
  memory.prefetch(0, 2, true, nullptr);
  CHECK_LAUNCH(launch_add(memory.page(0), 4, nullptr));
  memory.prefetch(0, 4, false, nullptr);
  CHECK(memory.page(3)[0] == 1.0f, "%g", memory.page(3)[0]);
  CHECK_COUNTS(.to_device = 4, .to_host = 4, .idle_prefetches = 2, .most_to_device = 1, .most_to_host = 1);
}

TEST(advice_maps_pages_of_the_host_on_the_device) {
  const Managed memory(4);
  memory.zero();
  CHECK(cudaMemAdvise(memory.page(0), 2 * kManagedPage, cudaMemAdviseSetAccessedBy, kOnDevice) == cudaSuccess, "by");
  CHECK(cudaMemAdvise(memory.page(3), 1, cudaMemAdviseSetPreferredLocation, kOnHost) == cudaSuccess, "where");
  CHECK_LAUNCH(launch_add(memory.page(0), 4, nullptr));
  CHECK_COUNTS(.device_faults = 2, .remote_accesses = 3, .to_device = 1, .most_to_device = 1);
  memory.prefetch(0, 4, true, nullptr);
  CHECK_LAUNCH(launch_add(memory.page(0), 4, nullptr));
  CHECK_COUNTS(.to_device = 3, .idle_prefetches = 1, .most_to_device = 1);
  CHECK(memory.page(0)[0] == 2.0f && memory.page(3)[0] == 2.0f, "values");
}

TEST(a_full_device_evicts_what_came_longest_ago) {
  const cuemu::WithDevice small(80);
  cuemu::device().total_bytes = 4 * kManagedPage;
  const Managed memory(6);
  memory.zero();
  memory.prefetch(0, 4, true, nullptr);
  CHECK_LAUNCH(launch_add(memory.page(4), 2, nullptr));  // in the place of pages 0 and 1
  CHECK_COUNTS(.device_faults = 2, .to_device = 6, .to_host = 2, .evicted = 2, .most_to_device = 1, .most_to_host = 1);
  CHECK_LAUNCH(launch_add(memory.page(0), 6, nullptr));  // one lane after the other, each in the place of the next
  const ManagedCounters counters = cuemu::take_managed_counters();
  CHECK(counters.device_faults == 6 && counters.evicted == 6, "%d faults", (int)counters.device_faults);
  void* plain = nullptr;
  CHECK(cudaMalloc(&plain, 3 * kManagedPage) == cudaSuccess, "room for three");
  CHECK_COUNTS(.to_host = 3, .evicted = 3, .most_to_host = 1);
  CHECK(cudaFree(plain) == cudaSuccess, "freed");
}

TEST(copies_move_nothing_and_a_memset_is_a_kernel) {
  const Managed memory(3);
  memory.zero();
  std::vector<float> host(3 * kPageFloats, 5.0f);
  memory.prefetch(1, 1, true, nullptr);
  CHECK(cudaMemcpy(memory.page(0), host.data(), 3 * kManagedPage, cudaMemcpyHostToDevice) == cudaSuccess, "in");
  CHECK(cudaMemcpy(host.data(), memory.page(0), 3 * kManagedPage, cudaMemcpyDeviceToHost) == cudaSuccess, "out");
  CHECK(host[2 * kPageFloats] == 5.0f, "%g", host[2 * kPageFloats]);
  CHECK_COUNTS(.to_device = 1, .most_to_device = 1);
  CHECK(cudaMemset(memory.page(0), 0, 2 * kManagedPage) == cudaSuccess, "memset");
  CHECK_COUNTS(.device_faults = 1, .to_device = 1, .most_to_device = 1);
}

TEST(a_launch_that_touches_freed_memory_fails) {
  Managed memory(2);
  float* page = memory.page(0);
  CHECK(cudaFree(memory.forget()) == cudaSuccess, "freed");
  cuemu::print_reports(false);
  CHECK(launch_add(page, 2, nullptr) != cudaSuccess, "reported");
  CHECK(cudaMemset(page, 0, 8) != cudaSuccess, "reported again");
  cuemu::print_reports(true);
  const std::string said = cuemu::take_reports();
  CHECK(said.find("byte 0 of 131072 bytes of") != std::string::npos, "%s", said.c_str());
  CHECK(said.find("that cudaFree has taken back") != std::string::npos, "%s", said.c_str());
  (void)cudaGetLastError();
}

TEST(managed_memory_has_red_zones) {
  const Managed memory(1);
  cuemu::print_reports(false);
#if defined(CUEMU_ASAN)
  CHECK_LAUNCH(launch_add(memory.page(0), 1, nullptr));  // AddressSanitizer would end the process
#else
  CHECK(launch_add(memory.page(0) + kPageFloats, 1, nullptr) != cudaSuccess, "reported");
  CHECK(cuemu::take_reports().find("of a device allocation of 65536 bytes") != std::string::npos, "in words");
#endif
  cuemu::print_reports(true);
  (void)cuemu::take_managed_counters();
  (void)cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams that run late

TEST(what_streams_and_events_order_runs_in_this_order) {
  cuemu::over_all_stream_orders([](const char* order) {
    cudaStream_t one = nullptr;
    cudaStream_t other = nullptr;
    cudaStream_t blocking = nullptr;
    cudaEvent_t event = nullptr;
    cudaStreamCreateWithFlags(&one, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaStreamCreate(&blocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    const cuemu::DeviceBuffer<char> x(8);
    std::vector<char> seen(3);
    CHECK(cudaMemsetAsync(x.data(), 1, 8, one) == cudaSuccess && cudaEventRecord(event, one) == cudaSuccess, "one");
    CHECK(cudaStreamWaitEvent(other, event, 0) == cudaSuccess, "wait");
    CHECK(cudaMemcpyAsync(&seen[0], x.data(), 1, cudaMemcpyDeviceToHost, other) == cudaSuccess, "other");
    CHECK(cudaStreamSynchronize(other) == cudaSuccess && seen[0] == 1, "%s: %d", order, seen[0]);
    CHECK(cudaMemsetAsync(x.data(), 2, 8, blocking) == cudaSuccess, "a stream that waits for the default one");
    CHECK(cudaMemcpyAsync(&seen[1], x.data(), 1, cudaMemcpyDeviceToHost, nullptr) == cudaSuccess, "the default one");
    CHECK(cudaMemsetAsync(x.data(), 3, 8, blocking) == cudaSuccess, "again");
    CHECK(cudaEventRecord(event, blocking) == cudaSuccess && cudaEventDestroy(event) == cudaSuccess, "recorded");
    CHECK(cudaMemcpyAsync(&seen[2], x.data(), 1, cudaMemcpyDeviceToHost, blocking) == cudaSuccess, "last");
    CHECK(cudaDeviceSynchronize() == cudaSuccess && seen[1] == 2 && seen[2] == 3, "%s: %d %d", order, seen[1], seen[2]);
    for (const cudaStream_t stream : {one, other, blocking}) {
      CHECK(cudaStreamDestroy(stream) == cudaSuccess, "destroyed");
    }
  });
}

TEST(a_question_answers_that_work_is_queued) {
  cuemu::set_stream_order({true, 1});
  const cuemu::DeviceBuffer<char> x(8);
  CHECK(cudaMemsetAsync(x.data(), 1, 8, nullptr) == cudaSuccess, "queued");
  CHECK(cudaStreamQuery(nullptr) == cudaErrorNotReady && cudaStreamQuery(nullptr) == cudaSuccess, "asked twice");
  CHECK(cudaGetLastError() == cudaSuccess, "no error");
  cuemu::set_stream_order({});
}

// ---------------------------------------------------------------------------------------------------------------------
// A step over an arena in chunks of two pages, and its defects

enum class Flaw {
  kNone,
  kNoPrefetch,
  kPrefetchAfterUse,
  kPrefetchOnAnotherStream,
  kReleaseOnAnotherStream,
  kChunksShareAPage,
  kReleaseBeforeUse,
  kFreeWhileQueued,
};

constexpr size_t kChunkPages = 2;
constexpr size_t kChunks = 4;

// What is wrong with two steps, in words; empty if nothing is.
std::string paged_steps(Flaw flaw) {
  Managed memory(kChunks * kChunkPages);
  memory.zero();
  cudaStream_t stream = nullptr;
  cudaStream_t other = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
  const size_t overlap = flaw == Flaw::kChunksShareAPage ? 1 : 0;
  const auto move = [&](size_t chunk, bool to_device) {
    const bool strays = flaw == (to_device ? Flaw::kPrefetchOnAnotherStream : Flaw::kReleaseOnAnotherStream);
    const size_t extra = chunk + 1 < kChunks ? overlap : 0;
    memory.prefetch(chunk * kChunkPages, kChunkPages + extra, to_device, strays ? other : stream);
  };
  for (int step = 0; step < 2; ++step) {
    for (size_t chunk = 0; chunk < kChunks; ++chunk) {
      const bool ahead = flaw != Flaw::kNoPrefetch && flaw != Flaw::kPrefetchAfterUse;
      if (ahead) {
        move(chunk, true);
      }
      if (flaw == Flaw::kReleaseBeforeUse) {
        move(chunk, false);
      }
      (void)launch_add(memory.page(chunk * kChunkPages), kChunkPages, stream);
      if (flaw == Flaw::kPrefetchAfterUse) {
        move(chunk, true);
      }
      if (flaw != Flaw::kReleaseBeforeUse) {
        move(chunk, false);
      }
    }
  }
  if (flaw == Flaw::kFreeWhileQueued) {
    (void)cudaFree(memory.forget());
  }
  (void)cudaDeviceSynchronize();
  cudaStreamDestroy(stream);
  cudaStreamDestroy(other);
  std::string wrong = cuemu::take_reports();
  const ManagedCounters counters = cuemu::take_managed_counters();
  wrong += counters.device_faults > 0 ? "device faults; " : "";
  wrong += counters.most_to_device > 2 || counters.most_to_host > 2 ? "a page moved twice in a step; " : "";
  if (flaw != Flaw::kFreeWhileQueued) {
    for (size_t page = 0; page < kChunks * kChunkPages; ++page) {
      wrong += memory.page(page)[0] != 2.0f ? "a wrong result; " : "";
    }
    (void)cuemu::take_managed_counters();
  }
  return wrong;
}

std::string found_in_any_order(Flaw flaw) {
  std::string found;
  cuemu::print_reports(false);
  for (const cuemu::StreamOrder& order : cuemu::all_stream_orders()) {
    cuemu::set_stream_order(order);
    found += paged_steps(flaw);
  }
  cuemu::set_stream_order({});
  cuemu::print_reports(true);
  (void)cudaGetLastError();
  return found;
}

TEST(a_sound_paged_step_is_silent) {
  const std::string found = found_in_any_order(Flaw::kNone);
  CHECK(found.empty(), "%s", found.c_str());
}

TEST(defects_of_a_paged_step_are_seen) {
  const struct {
    Flaw flaw;
    const char* name;
    const char* words;
  } kFlaws[] = {
      {Flaw::kNoPrefetch, "no prefetch", "device faults"},
      {Flaw::kPrefetchAfterUse, "prefetch after use", "device faults"},
      {Flaw::kPrefetchOnAnotherStream, "prefetch on another stream without an event", "device faults"},
      {Flaw::kReleaseOnAnotherStream, "release on another stream without an event", "device faults"},
      {Flaw::kReleaseBeforeUse, "release before use", "device faults"},
      {Flaw::kChunksShareAPage, "chunks that share a page", "a page moved twice in a step"},
      {Flaw::kFreeWhileQueued, "freed while kernels are queued", "cudaFree while"},
  };
  for (const auto& [flaw, name, words] : kFlaws) {
    const std::string found = found_in_any_order(flaw);
    CHECK(found.find(words) != std::string::npos, "%s: expected '%s' in: %s", name, words, found.c_str());
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The same with copies to two buffers on streams of their own

enum class CopyFlaw { kNone, kNoWaitForCopyIn, kNoWaitForUpdate, kNoWaitForCopyOut };

std::string copied_steps(CopyFlaw flaw) {
  constexpr size_t kBytes = kChunkPages * kManagedPage;
  std::vector<float> host(kChunks * kChunkPages * kPageFloats);
  const cuemu::DeviceBuffer<float> buffers(2 * kChunkPages * kPageFloats);
  cudaStream_t streams[3] = {};  // copies in, updates, copies out
  for (cudaStream_t& stream : streams) {
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  }
  cudaEvent_t done[2][3] = {};
  for (auto& of_buffer : done) {
    for (cudaEvent_t& event : of_buffer) {
      cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    }
  }
  const auto wait = [&](int stream, size_t buffer, int stage, CopyFlaw without) {
    if (flaw != without) {
      cudaStreamWaitEvent(streams[stream], done[buffer][stage], 0);
    }
  };
  for (size_t i = 0; i < 2 * kChunks; ++i) {
    float* arena = host.data() + i % kChunks * kChunkPages * kPageFloats;
    float* buffer = buffers.data() + i % 2 * kChunkPages * kPageFloats;
    wait(0, i % 2, 2, CopyFlaw::kNoWaitForCopyOut);
    cudaMemcpyAsync(buffer, arena, kBytes, cudaMemcpyHostToDevice, streams[0]);
    cudaEventRecord(done[i % 2][0], streams[0]);
    wait(1, i % 2, 0, CopyFlaw::kNoWaitForCopyIn);
    (void)launch_add(buffer, kChunkPages, streams[1]);
    cudaEventRecord(done[i % 2][1], streams[1]);
    wait(2, i % 2, 1, CopyFlaw::kNoWaitForUpdate);
    cudaMemcpyAsync(arena, buffer, kBytes, cudaMemcpyDeviceToHost, streams[2]);
    cudaEventRecord(done[i % 2][2], streams[2]);
  }
  (void)cudaDeviceSynchronize();
  for (int i = 0; i < 3; ++i) {
    cudaStreamDestroy(streams[i]);
    cudaEventDestroy(done[0][i]);
    cudaEventDestroy(done[1][i]);
  }
  std::string wrong;
  for (size_t page = 0; page < kChunks * kChunkPages; ++page) {
    wrong += host[page * kPageFloats] != 2.0f ? "a wrong result; " : "";
  }
  return wrong;
}

TEST(defects_of_copies_on_side_streams_are_seen) {
  for (const CopyFlaw flaw :
       {CopyFlaw::kNone, CopyFlaw::kNoWaitForCopyIn, CopyFlaw::kNoWaitForUpdate, CopyFlaw::kNoWaitForCopyOut}) {
    std::string found;
    for (const cuemu::StreamOrder& order : cuemu::all_stream_orders()) {
      cuemu::set_stream_order(order);
      found += copied_steps(flaw);
    }
    cuemu::set_stream_order({});
    CHECK(found.empty() == (flaw == CopyFlaw::kNone), "flaw %d: %s", static_cast<int>(flaw), found.c_str());
  }
}

}  // namespace
