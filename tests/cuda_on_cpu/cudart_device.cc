// The device, its limits, and errors of the runtime stub.
#include <cstdio>
#include <cstring>
#include <utility>

#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"

namespace {

using cuemu::device;
using cuemu::remember;

cudaError_t last_error = cudaSuccess;

struct Error {
  cudaError_t code;
  const char* name;
  const char* words;
};

constexpr Error kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "the emulator found an error in the kernel"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
};

const Error* error_of(cudaError_t code) {
  for (const Error& error : kErrors) {
    if (error.code == code) {
      return &error;
    }
  }
  return nullptr;
}

constexpr size_t kSharedWithoutOptIn = 48 * 1024;
constexpr int kL2Bytes = 40 << 20;

}  // namespace

namespace cuemu {

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

}  // namespace cuemu

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  const Error* found = error_of(error);
  return found != nullptr ? found->words : "unrecognized error code";
}

const char* cudaGetErrorName(cudaError_t error) {
  const Error* found = error_of(error);
  return found != nullptr ? found->name : "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) { return remember(ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (ordinal != 0) {
    return remember(cudaErrorInvalidDevice);
  }
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().sm / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().sm % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device().num_sms;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(kSharedWithoutOptIn);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(device().shared_bytes_per_block);
      return cudaSuccess;
    case cudaDevAttrConcurrentManagedAccess:
      *value = device().concurrent_managed_access ? 1 : 0;
      return cudaSuccess;
    case cudaDevAttrManagedMemory:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = kL2Bytes;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    default:
      return remember(cudaErrorNotSupported);
  }
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal) {
  if (ordinal != 0) {
    return remember(cudaErrorInvalidDevice);
  }
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "emulated sm_%d", device().sm);
  properties->major = device().sm / 10;
  properties->minor = device().sm % 10;
  properties->multiProcessorCount = device().num_sms;
  properties->totalGlobalMem = device().total_bytes;
  properties->sharedMemPerBlock = kSharedWithoutOptIn;
  properties->sharedMemPerBlockOptin = device().shared_bytes_per_block;
  properties->sharedMemPerMultiprocessor = device().shared_bytes_per_block;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->l2CacheSize = kL2Bytes;
  properties->managedMemory = 1;
  properties->concurrentManagedAccess = device().concurrent_managed_access ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

// A variable of the device is the host's own.
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = const_cast<void*>(symbol);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool fits = value >= 0 && static_cast<size_t>(value) <= device().shared_bytes_per_block;
  const bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ||
                     attribute == cudaFuncAttributePreferredSharedMemoryCarveout;
  return remember(known && fits ? cudaSuccess : cudaErrorInvalidValue);
}

// One block a multiprocessor: an answer that every real device reaches.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

}  // extern "C"
