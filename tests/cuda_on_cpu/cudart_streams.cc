// Streams and events of the runtime stub.
#include <chrono>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#include "cuda_on_cpu/capture.h"
#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/streams.h"

struct CUevent_st {
  int ordinal;
  cuemu::Record record;  // the last one
};

namespace {

std::set<cudaEvent_t>& events() {
  static std::set<cudaEvent_t> all;
  return all;
}

// Waits by calling `finish` unless a capture refuses it; what went wrong on the device comes to light then.
cudaError_t wait(cudaError_t refusal, const std::function<cudaError_t()>& finish) {
  return cuemu::remember(refusal != cudaSuccess ? refusal : cuemu::surface_error(finish()));
}

cudaError_t submit_task(cudaStream_t stream, std::function<cudaError_t()> work, cuemu::TaskRef after,
                        cuemu::TaskRef& task) {
  if (!cuemu::exists(stream)) {
    return cudaErrorInvalidResourceHandle;
  }
  if (cuemu::is_captured(stream)) {
    return cuemu::capture_work(stream, std::move(work));
  }
  if (cuemu::is_default(stream)) {
    if (const cudaError_t error = cuemu::refuse_default_stream(); error != cudaSuccess) {
      return error;
    }
  }
  return cuemu::enqueue(stream, std::move(work), std::move(after), task);
}

bool is_pending(cudaEvent_t event) { return event->record.task != nullptr && !event->record.task->is_done; }

}  // namespace

namespace cuemu {

cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work) {
  TaskRef task;
  return submit_task(stream, std::move(work), nullptr, task);
}

}  // namespace cuemu

using cuemu::remember;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  CUEMU_REQUIRE_CONTEXT();
  *stream = cuemu::make_stream((flags & cudaStreamNonBlocking) == 0);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  if (cuemu::is_default(stream) || !cuemu::exists(stream)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  cuemu::destroy(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  return cuemu::exists(stream) ? wait(cuemu::refuse_wait(stream), [stream] { return cuemu::finish(stream); })
                               : remember(cudaErrorInvalidResourceHandle);
}

// A query completes the stream: whoever polls sees it done at some time.
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  const bool queued = cuemu::exists(stream) && cuemu::num_queued(stream) > 0;
  const cudaError_t error = cudaStreamSynchronize(stream);
  return queued && error == cudaSuccess ? cudaErrorNotReady : error;
}

cudaError_t cudaDeviceSynchronize() {
  CUEMU_REQUIRE_CONTEXT();
  return wait(cuemu::refuse_wait_for_device(), cuemu::finish_all);
}

// A stream that waits for a captured event joins the capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  CUEMU_REQUIRE_CONTEXT();
  if (!cuemu::exists(stream) || !events().contains(event)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  if (flags != 0) {
    return remember(cudaErrorNotSupported);
  }
  if (cuemu::is_captured(stream) || event->record.capture != 0) {
    return remember(cuemu::capture_wait(stream, event->record));
  }
  if (!is_pending(event)) {
    return cudaSuccess;
  }
  cuemu::TaskRef task;
  return remember(submit_task(stream, [] { return cudaSuccess; }, event->record.task, task));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  CUEMU_REQUIRE_CONTEXT();
  *event = new CUevent_st{cuemu::current_device(), {}};
  events().insert(*event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  CUEMU_REQUIRE_CONTEXT();
  if (events().erase(event) == 0) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  if (!events().contains(event) || !cuemu::exists(stream) || event->ordinal != cuemu::device_of_stream(stream)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  if (cuemu::is_captured(stream)) {
    return remember(cuemu::capture_record(stream, event->record));
  }
  event->record = {};
  return remember(submit_task(stream, [] { return cudaSuccess; }, nullptr, event->record.task));
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  CUEMU_REQUIRE_CONTEXT();
  if (!events().contains(event)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  return wait(cuemu::refuse_wait(event->record),
              [event] { return event->record.task == nullptr ? cudaSuccess : cuemu::finish(event->record.task); });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  CUEMU_REQUIRE_CONTEXT();
  const bool queued = events().contains(event) && is_pending(event);
  const cudaError_t error = cudaEventSynchronize(event);
  return queued && error == cudaSuccess ? cudaErrorNotReady : error;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  CUEMU_REQUIRE_CONTEXT();
  const auto has_happened = [](cudaEvent_t event) { return events().contains(event) && event->record.task != nullptr; };
  if (!has_happened(start) || !has_happened(end) || start->ordinal != end->ordinal) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  if (is_pending(start) || is_pending(end)) {
    return cudaErrorNotReady;
  }
  const auto elapsed = end->record.task->ended - start->record.task->ended;
  *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  CUEMU_REQUIRE_CONTEXT();
  return remember(cuemu::submit(stream, [function, data] {
    function(data);
    return cudaSuccess;
  }));
}

}  // extern "C"
