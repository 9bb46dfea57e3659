// Streams, events, capture and graphs of the runtime stub.
#include <chrono>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/streams.h"

struct CUgraphExec_st {
  std::vector<std::function<cudaError_t()>> work;
};

struct CUevent_st {
  cuemu::TaskRef last;  // its last record; null before the first one
};

namespace {

std::set<cudaEvent_t>& events() {
  static std::set<cudaEvent_t> all;
  return all;
}

int capturing = 0;

// Waits by calling `finish`, unless a stream is being captured.
cudaError_t wait(const std::function<cudaError_t()>& finish) {
  return cuemu::remember(capturing > 0 ? cudaErrorStreamCaptureUnsupported : finish());
}

cudaError_t submit_task(cudaStream_t stream, std::function<cudaError_t()> work, cuemu::TaskRef after,
                        cuemu::TaskRef& task) {
  if (!cuemu::exists(stream)) {
    return cudaErrorInvalidResourceHandle;
  }
  if (!cuemu::is_default(stream) && cuemu::graph_of(stream) != nullptr) {
    cuemu::graph_of(stream)->work.push_back(std::move(work));
    return cudaSuccess;
  }
  if (capturing > 0 && cuemu::is_default(stream)) {
    return cudaErrorStreamCaptureImplicit;
  }
  return cuemu::enqueue(stream, std::move(work), std::move(after), task);
}

}  // namespace

namespace cuemu {

bool is_capturing() { return capturing > 0; }

cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work) {
  TaskRef task;
  return submit_task(stream, std::move(work), nullptr, task);
}

}  // namespace cuemu

using cuemu::remember;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  *stream = cuemu::make_stream((flags & cudaStreamNonBlocking) == 0);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (cuemu::is_default(stream) || !cuemu::exists(stream)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  cuemu::destroy(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return cuemu::exists(stream) ? wait([stream] { return cuemu::finish(stream); })
                               : remember(cudaErrorInvalidResourceHandle);
}

// A query completes the stream: whoever polls sees it done at some time.
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const bool queued = capturing == 0 && cuemu::exists(stream) && cuemu::num_queued(stream) > 0;
  const cudaError_t error = cudaStreamSynchronize(stream);
  return queued && error == cudaSuccess ? cudaErrorNotReady : error;
}

cudaError_t cudaDeviceSynchronize() { return wait(cuemu::finish_all); }

// A capture does not spread to other streams.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!cuemu::exists(stream) || !events().contains(event)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  const bool captured = !cuemu::is_default(stream) && cuemu::graph_of(stream) != nullptr;
  if (captured || event->last == nullptr || event->last->is_done) {
    return cudaSuccess;
  }
  cuemu::TaskRef task;
  return remember(submit_task(stream, [] { return cudaSuccess; }, event->last, task));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  events().insert(*event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (events().erase(event) == 0) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!events().contains(event)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  return remember(submit_task(stream, [] { return cudaSuccess; }, nullptr, event->last));
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (!events().contains(event)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  return wait([event] { return event->last == nullptr ? cudaSuccess : cuemu::finish(event->last); });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const bool queued = capturing == 0 && events().contains(event) && event->last != nullptr && !event->last->is_done;
  const cudaError_t error = cudaEventSynchronize(event);
  return queued && error == cudaSuccess ? cudaErrorNotReady : error;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const auto has_happened = [](cudaEvent_t event) { return events().contains(event) && event->last != nullptr; };
  if (!has_happened(start) || !has_happened(end)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  if (!start->last->is_done || !end->last->is_done) {
    return cudaErrorNotReady;
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->last->ended - start->last->ended).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (cuemu::is_default(stream)) {
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  if (!cuemu::exists(stream) || cuemu::graph_of(stream) != nullptr) {
    return remember(cudaErrorIllegalState);
  }
  cuemu::graph_of(stream) = new CUgraph_st;
  ++capturing;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (cuemu::is_default(stream) || !cuemu::exists(stream) || cuemu::graph_of(stream) == nullptr) {
    return remember(cudaErrorIllegalState);
  }
  *graph = std::exchange(cuemu::graph_of(stream), nullptr);
  --capturing;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool captured = !cuemu::is_default(stream) && cuemu::exists(stream) && cuemu::graph_of(stream) != nullptr;
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num_nodes) {
  if (nodes != nullptr) {
    return remember(cudaErrorNotSupported);
  }
  *num_nodes = graph->work.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return remember(cuemu::submit(stream, [executable] {
    for (const auto& work : executable->work) {
      if (const cudaError_t error = work(); error != cudaSuccess) {
        return error;
      }
    }
    return cudaSuccess;
  }));
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return remember(cuemu::submit(stream, [function, data] {
    function(data);
    return cudaSuccess;
  }));
}

}  // extern "C"
