// Streams, events, capture and graphs of the runtime stub.
#include <chrono>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/launch.h"

struct CUgraph_st {
  std::vector<std::function<cudaError_t()>> work;
};

struct CUgraphExec_st {
  std::vector<std::function<cudaError_t()>> work;
};

struct CUstream_st {
  CUgraph_st* graph = nullptr;  // while it is captured
};

struct CUevent_st {
  std::chrono::steady_clock::time_point at{};
  bool recorded = false;
};

namespace {

std::set<cudaStream_t>& streams() {
  static std::set<cudaStream_t> all;
  return all;
}

std::set<cudaEvent_t>& events() {
  static std::set<cudaEvent_t> all;
  return all;
}

int capturing = 0;

bool is_default(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

bool exists(cudaStream_t stream) { return is_default(stream) || streams().contains(stream); }

cudaError_t wait_is_allowed() {
  return cuemu::remember(capturing > 0 ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}

}  // namespace

namespace cuemu {

bool is_capturing() { return capturing > 0; }

cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (!exists(stream)) {
    return cudaErrorInvalidResourceHandle;
  }
  if (!is_default(stream) && stream->graph != nullptr) {
    stream->graph->work.push_back(std::move(work));
    return cudaSuccess;
  }
  if (capturing > 0 && is_default(stream)) {
    return cudaErrorStreamCaptureImplicit;
  }
  return work();
}

}  // namespace cuemu

using cuemu::remember;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = new CUstream_st;
  streams().insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (streams().erase(stream) == 0) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return exists(stream) ? wait_is_allowed() : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

cudaError_t cudaDeviceSynchronize() { return wait_is_allowed(); }

// Work runs in the order of the calls, so there is nothing to wait for. A capture does not spread to other streams.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return remember(exists(stream) && events().contains(event) ? cudaSuccess : cudaErrorInvalidResourceHandle);
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
  return remember(cuemu::submit(stream, [event] {
    event->at = std::chrono::steady_clock::now();
    event->recorded = true;
    return cudaSuccess;
  }));
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return remember(events().contains(event) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return events().contains(event) ? wait_is_allowed() : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!events().contains(start) || !events().contains(end) || !start->recorded || !end->recorded) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->at - start->at).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (is_default(stream)) {
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  if (!exists(stream) || stream->graph != nullptr) {
    return remember(cudaErrorIllegalState);
  }
  stream->graph = new CUgraph_st;
  ++capturing;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (is_default(stream) || !exists(stream) || stream->graph == nullptr) {
    return remember(cudaErrorIllegalState);
  }
  *graph = std::exchange(stream->graph, nullptr);
  --capturing;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool captured = !is_default(stream) && exists(stream) && stream->graph != nullptr;
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
