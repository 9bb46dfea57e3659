#include "cuda_on_cpu/capture.h"

#include <algorithm>
#include <list>
#include <map>
#include <set>
#include <thread>
#include <utility>

#include "cuda_on_cpu/device.h"

namespace cuemu {
namespace {

struct Node {
  std::function<cudaError_t()> work;
  std::vector<size_t> after;
};

struct Capture {
  uint64_t number;
  cudaStream_t origin;
  int ordinal;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool is_valid = true;
  std::vector<Node> nodes;
  std::map<cudaStream_t, std::vector<size_t>> last;  // of each stream: what its next work comes after

  cudaError_t invalidate(cudaError_t error) {
    is_valid = false;
    return error;
  }

  // Whether `begin` comes after everything that was captured.
  bool joins_all(const std::vector<size_t>& begin) const {
    std::set<size_t> reached;
    std::vector<size_t> waiting = begin;
    while (!waiting.empty()) {
      const size_t node = waiting.back();
      waiting.pop_back();
      if (reached.insert(node).second) {
        waiting.insert(waiting.end(), nodes[node].after.begin(), nodes[node].after.end());
      }
    }
    return reached.size() == nodes.size();
  }
};

std::list<Capture> captures;
uint64_t num_captures = 0;
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

Capture* capture_of(cudaStream_t stream) {
  const auto found = std::find_if(captures.begin(), captures.end(),
                                  [stream](const Capture& capture) { return capture.last.contains(stream); });
  return found != captures.end() ? &*found : nullptr;
}

Capture* capture_numbered(uint64_t number) {
  const auto found = std::find_if(captures.begin(), captures.end(),
                                  [number](const Capture& capture) { return capture.number == number; });
  return found != captures.end() ? &*found : nullptr;
}

bool forbids_unsafe_calls(const Capture& capture) {
  const bool local = capture.thread == std::this_thread::get_id() && capture.mode != cudaStreamCaptureModeRelaxed;
  switch (mode_of_thread) {
    case cudaStreamCaptureModeGlobal:
      return local || capture.mode == cudaStreamCaptureModeGlobal;
    case cudaStreamCaptureModeThreadLocal:
      return local;
    default:
      return false;
  }
}

}  // namespace

cudaError_t begin_capture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (is_default(stream)) {
    return cudaErrorStreamCaptureUnsupported;
  }
  if (!exists(stream)) {
    return cudaErrorInvalidResourceHandle;
  }
  if (is_captured(stream)) {
    return cudaErrorIllegalState;
  }
  captures.push_back(
      {++num_captures, stream, device_of_stream(stream), mode, std::this_thread::get_id(), true, {}, {}});
  captures.back().last[stream] = {};
  return cudaSuccess;
}

cudaError_t end_capture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  Capture* capture = capture_of(stream);
  if (capture == nullptr) {
    return cudaErrorIllegalState;
  }
  if (capture->origin != stream) {
    return capture->invalidate(cudaErrorStreamCaptureUnmatched);
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    return capture->invalidate(cudaErrorStreamCaptureWrongThread);
  }
  cudaError_t error = cudaSuccess;
  if (!capture->is_valid) {
    error = cudaErrorStreamCaptureInvalidated;
  } else if (!capture->joins_all(capture->last[stream])) {
    error = cudaErrorStreamCaptureUnjoined;
  } else {
    *graph = new CUgraph_st;
    for (Node& node : capture->nodes) {
      (*graph)->work.push_back(std::move(node.work));
    }
  }
  captures.remove_if([capture](const Capture& other) { return &other == capture; });
  return error;
}

cudaStreamCaptureStatus capture_status(cudaStream_t stream) {
  const Capture* capture = capture_of(stream);
  return capture == nullptr  ? cudaStreamCaptureStatusNone
         : capture->is_valid ? cudaStreamCaptureStatusActive
                             : cudaStreamCaptureStatusInvalidated;
}

bool is_captured(cudaStream_t stream) { return capture_of(stream) != nullptr; }

cudaError_t capture_work(cudaStream_t stream, std::function<cudaError_t()> work) {
  Capture& capture = *capture_of(stream);
  if (!capture.is_valid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  capture.nodes.push_back({std::move(work), std::exchange(capture.last[stream], {capture.nodes.size()})});
  return cudaSuccess;
}

cudaError_t capture_record(cudaStream_t stream, Record& record) {
  const Capture& capture = *capture_of(stream);
  if (!capture.is_valid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  record = {nullptr, capture.number, capture.last.at(stream)};
  return cudaSuccess;
}

cudaError_t capture_wait(cudaStream_t stream, const Record& record) {
  Capture* capture = capture_of(stream);
  if (capture != nullptr && !capture->is_valid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  if (record.capture == 0) {  // of work outside the capture
    return record.task == nullptr ? cudaSuccess : capture->invalidate(cudaErrorStreamCaptureIsolation);
  }
  Capture* recorded = capture_numbered(record.capture);
  if (recorded == nullptr) {
    return capture != nullptr ? capture->invalidate(cudaErrorCapturedEvent) : cudaErrorCapturedEvent;
  }
  if (!recorded->is_valid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  if (capture != nullptr && capture != recorded) {
    recorded->is_valid = false;
    return capture->invalidate(cudaErrorStreamCaptureMerge);
  }
  if (is_default(stream)) {
    return recorded->invalidate(cudaErrorStreamCaptureImplicit);
  }
  std::vector<size_t>& last = recorded->last[stream];  // a stream outside joins the capture
  for (const size_t node : record.after) {
    if (std::find(last.begin(), last.end(), node) == last.end()) {
      last.push_back(node);
    }
  }
  return cudaSuccess;
}

cudaError_t refuse_unsafe() {
  cudaError_t error = cudaSuccess;
  for (Capture& capture : captures) {
    if (forbids_unsafe_calls(capture)) {
      error = capture.invalidate(cudaErrorStreamCaptureUnsupported);
    }
  }
  return error;
}

cudaError_t refuse_wait(cudaStream_t stream) {
  if (Capture* capture = capture_of(stream); capture != nullptr) {
    return capture->is_valid ? capture->invalidate(cudaErrorStreamCaptureUnsupported)
                             : cudaErrorStreamCaptureInvalidated;
  }
  if (is_default(stream)) {
    if (const cudaError_t error = refuse_default_stream(); error != cudaSuccess) {
      return error;
    }
  }
  return refuse_unsafe();
}

cudaError_t refuse_wait(const Record& record) {
  if (record.capture != 0) {
    Capture* capture = capture_numbered(record.capture);
    return capture != nullptr ? capture->invalidate(cudaErrorCapturedEvent) : cudaErrorCapturedEvent;
  }
  return refuse_unsafe();
}

cudaError_t refuse_wait_for_device() {
  cudaError_t error = refuse_unsafe();
  for (Capture& capture : captures) {
    if (capture.ordinal == current_device()) {
      error = capture.invalidate(cudaErrorStreamCaptureUnsupported);
    }
  }
  return error;
}

cudaError_t refuse_default_stream() {
  cudaError_t error = cudaSuccess;
  for (Capture& capture : captures) {
    if (capture.ordinal == current_device()) {
      error = capture.invalidate(cudaErrorStreamCaptureImplicit);
    }
  }
  return error;
}

cudaStreamCaptureMode exchange_capture_mode(cudaStreamCaptureMode mode) { return std::exchange(mode_of_thread, mode); }

}  // namespace cuemu
