// The device, its limits, and errors of the runtime stub.
#include <cstdio>
#include <cstring>
#include <utility>

#include "cuda_on_cpu/cudart.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/launch.h"

namespace {

using cuemu::device;
using cuemu::kSharedWithoutOptIn;
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
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorPeerAccessAlreadyEnabled, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
    {cudaErrorPeerAccessNotEnabled, "cudaErrorPeerAccessNotEnabled", "peer access has not been enabled"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge",
     "operation would result in a merge of separate capture sequences"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
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

constexpr int kL2Bytes = 40 << 20;

bool is_device(int ordinal) { return ordinal >= 0 && ordinal < cuemu::num_devices(); }

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

cudaError_t cudaGetLastError() {
  CUEMU_REQUIRE_CONTEXT();
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  CUEMU_REQUIRE_CONTEXT();
  return last_error;
}

const char* cudaGetErrorString(cudaError_t error) {
  const Error* found = error_of(error);
  return found != nullptr ? found->words : "unrecognized error code";
}

const char* cudaGetErrorName(cudaError_t error) {
  const Error* found = error_of(error);
  return found != nullptr ? found->name : "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = cuemu::num_devices();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = cuemu::current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  if (!is_device(ordinal)) {
    return remember(cudaErrorInvalidDevice);
  }
  cuemu::set_current_device(ordinal);
  return cudaSuccess;
}

cudaError_t cudaDeviceReset() {
  cuemu::reset_context(cuemu::current_device());
  last_error = cudaSuccess;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int from, int to) {
  if (!is_device(from) || !is_device(to)) {
    return remember(cudaErrorInvalidDevice);
  }
  *can = from != to ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  CUEMU_REQUIRE_CONTEXT();
  if (!is_device(peer) || peer == cuemu::current_device()) {
    return remember(cudaErrorInvalidDevice);
  }
  if (flags != 0) {
    return remember(cudaErrorInvalidValue);
  }
  if (cuemu::has_peer_access(cuemu::current_device(), peer)) {
    return remember(cudaErrorPeerAccessAlreadyEnabled);
  }
  cuemu::set_peer_access(cuemu::current_device(), peer, true);
  return cudaSuccess;
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  CUEMU_REQUIRE_CONTEXT();
  if (!is_device(peer)) {
    return remember(cudaErrorInvalidDevice);
  }
  if (!cuemu::has_peer_access(cuemu::current_device(), peer)) {
    return remember(cudaErrorPeerAccessNotEnabled);
  }
  cuemu::set_peer_access(cuemu::current_device(), peer, false);
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (!is_device(ordinal)) {
    return remember(cudaErrorInvalidDevice);
  }
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device(ordinal).sm / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device(ordinal).sm % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device(ordinal).num_sms;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(kSharedWithoutOptIn);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(device(ordinal).shared_bytes_per_block);
      return cudaSuccess;
    case cudaDevAttrConcurrentManagedAccess:
      *value = device(ordinal).concurrent_managed_access ? 1 : 0;
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
  if (!is_device(ordinal)) {
    return remember(cudaErrorInvalidDevice);
  }
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "emulated sm_%d", device(ordinal).sm);
  properties->major = device(ordinal).sm / 10;
  properties->minor = device(ordinal).sm % 10;
  properties->multiProcessorCount = device(ordinal).num_sms;
  properties->totalGlobalMem = device(ordinal).total_bytes;
  properties->sharedMemPerBlock = kSharedWithoutOptIn;
  properties->sharedMemPerBlockOptin = device(ordinal).shared_bytes_per_block;
  properties->sharedMemPerMultiprocessor = device(ordinal).shared_bytes_per_block;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->l2CacheSize = kL2Bytes;
  properties->managedMemory = 1;
  properties->concurrentManagedAccess = device(ordinal).concurrent_managed_access ? 1 : 0;
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

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  CUEMU_REQUIRE_CONTEXT();
  if (!cuemu::has_image_for(device().sm)) {
    return remember(cudaErrorNoKernelImageForDevice);
  }
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    return remember(value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue);
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > device().shared_bytes_per_block) {
    return remember(cudaErrorInvalidValue);
  }
  cuemu::opted_in_bytes(kernel) = static_cast<size_t>(value);
  return cudaSuccess;
}

// One block a multiprocessor: an answer that every real device reaches.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

}  // extern "C"
