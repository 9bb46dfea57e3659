// As much of the CUDA 12 runtime's declarations as the page stores use, to compile their CUDA 12 branch where the
// headers of CUDA 13 are installed, or none: tests/test_cuda_build.py. With CUDART_VERSION given, those of CUDA 13.
#pragma once

#include <cstddef>

#ifndef CUDART_VERSION
#define CUDART_VERSION 12080
#endif

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaMemoryAdvise { cudaMemAdviseSetPreferredLocation = 3, cudaMemAdviseSetAccessedBy = 5 };
enum cudaDeviceAttr { cudaDevAttrConcurrentManagedAccess = 89 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

inline constexpr int cudaCpuDeviceId = -1;
inline constexpr unsigned cudaMemAttachGlobal = 1;
inline constexpr unsigned cudaHostAllocDefault = 0;
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;

extern "C" {
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaMallocManaged(void** address, size_t num_bytes, unsigned flags);
cudaError_t cudaHostAlloc(void** address, size_t num_bytes, unsigned flags);
cudaError_t cudaFree(void* address);
cudaError_t cudaFreeHost(void* address);
cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t stream);
#if CUDART_VERSION >= 13000
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1, cudaMemLocationTypeHost = 2 };
struct cudaMemLocation {
  cudaMemLocationType type;
  int id;
};
cudaError_t cudaMemAdvise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, cudaMemLocation location);
cudaError_t cudaMemPrefetchAsync(const void* address, size_t num_bytes, cudaMemLocation location, unsigned flags,
                                 cudaStream_t stream);
#else
cudaError_t cudaMemAdvise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, int device);
cudaError_t cudaMemPrefetchAsync(const void* address, size_t num_bytes, int device, cudaStream_t stream);
#endif
}
