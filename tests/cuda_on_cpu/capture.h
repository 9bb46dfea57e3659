// Capture of streams into graphs, as the CUDA programming guide has it: one graph a capture, which spreads over the
// streams that wait for its events; what is not allowed during one is refused and invalidates it.
//
// Stricter than CUDA: work on a default stream is refused while any stream of its device is captured, not only if that
// stream waits for the default one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "cuda_on_cpu/streams.h"

struct CUgraph_st {
  std::vector<std::function<cudaError_t()>> work;  // in an order that its dependencies allow
};

namespace cuemu {

// Where an event was recorded last.
struct Record {
  TaskRef task;               // not in a capture; null before the first one
  uint64_t capture = 0;       // or in this one
  std::vector<size_t> after;  // the captured pieces of work that it stands for
};

cudaError_t begin_capture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(cudaStream_t stream, cudaGraph_t* graph);
cudaStreamCaptureStatus capture_status(cudaStream_t stream);

// Whether `stream` is captured, validly or not.
bool is_captured(cudaStream_t stream);

// Adds to the graph of a captured stream.
cudaError_t capture_work(cudaStream_t stream, std::function<cudaError_t()> work);
cudaError_t capture_record(cudaStream_t stream, Record& record);
cudaError_t capture_wait(cudaStream_t stream, const Record& record);

// For calls that are refused while a capture forbids them to this thread (cudaMalloc, say); invalidates that capture.
cudaError_t refuse_unsafe();

// For calls that wait for a stream, an event or the current device.
cudaError_t refuse_wait(cudaStream_t stream);
cudaError_t refuse_wait(const Record& record);
cudaError_t refuse_wait_for_device();

// For work on a default stream.
cudaError_t refuse_default_stream();

// Of this thread; returns the one before.
cudaStreamCaptureMode exchange_capture_mode(cudaStreamCaptureMode mode);

}  // namespace cuemu
