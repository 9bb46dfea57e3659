// Capture and graphs of the runtime stub.
#include "cuda_on_cpu/capture.h"
#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/launch.h"

struct CUgraphExec_st {
  std::vector<std::function<cudaError_t()>> work;
};

using cuemu::remember;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  CUEMU_REQUIRE_CONTEXT();
  return remember(cuemu::begin_capture(stream, mode));
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  CUEMU_REQUIRE_CONTEXT();
  return remember(cuemu::end_capture(stream, graph));
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  CUEMU_REQUIRE_CONTEXT();
  *status = cuemu::capture_status(stream);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  CUEMU_REQUIRE_CONTEXT();
  *mode = cuemu::exchange_capture_mode(*mode);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num_nodes) {
  CUEMU_REQUIRE_CONTEXT();
  if (nodes != nullptr) {
    return remember(cudaErrorNotSupported);
  }
  *num_nodes = graph->work.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  CUEMU_REQUIRE_CONTEXT();
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  CUEMU_REQUIRE_CONTEXT();
  return remember(cuemu::submit(stream, [work = executable->work] {
    for (const auto& piece : work) {
      if (const cudaError_t error = piece(); error != cudaSuccess) {
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

}  // extern "C"
