// What the test of a kernel needs: device memory with exact bounds, and every schedule. See docs/cuda-on-cpu.md.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <vector>

#include "cpp/check.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/schedule.h"
#include "cuda_on_cpu/streams.h"

namespace cuemu {

// Device memory for `size` elements and not one byte more. It begins at a multiple of 256 bytes, or `offset_bytes`
// after one, to test what a kernel does with addresses that allow no vectors.
template <typename T>
class DeviceBuffer {
 public:
  // Unwritten: every byte is 0xff, which reads as NaN.
  explicit DeviceBuffer(size_t size, size_t offset_bytes = 0)
      : size_(size), memory_(size == 0 ? nullptr : allocate_global(size * sizeof(T), offset_bytes)) {}

  explicit DeviceBuffer(const std::vector<T>& values, size_t offset_bytes = 0)
      : DeviceBuffer(values.size(), offset_bytes) {
    if (size_ > 0) {
      copy_bytes(data(), values.data(), size_ * sizeof(T));
    }
  }

  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { free_global(memory_); }

  size_t size() const { return size_; }

  // Null if size() is 0.
  T* data() const { return static_cast<T*>(memory_); }

  std::vector<T> host() const {
    std::vector<T> values(size_);
    if (size_ > 0) {
      copy_bytes(values.data(), data(), size_ * sizeof(T));
    }
    return values;
  }

  void clear() {  // to unwritten
    if (size_ > 0) {
      fill_bytes(data(), 0xff, size_ * sizeof(T));
    }
  }

 private:
  size_t size_;
  void* memory_;
};

// Calls test(name of the schedule) under each schedule, and fails if the emulator reported anything.
template <typename Test>
void over_all_schedules(Test test) {
  for (const Schedule& schedule : all_schedules()) {
    set_schedule(schedule);
    const std::string name = name_of(schedule);
    test(name.c_str());
    const std::string reports = take_reports();
    CHECK(reports.empty(), "under the schedule '%s':\n%s", name.c_str(), reports.c_str());
  }
  set_schedule({});
}

// Calls test(name of the order) at once and with streams that run late; the test waits for its streams before it reads.
template <typename Test>
void over_all_stream_orders(Test test) {
  for (const StreamOrder& order : all_stream_orders()) {
    set_stream_order(order);
    const std::string name = order.is_late ? "streams late, seed " + std::to_string(order.seed) : "at once";
    test(name.c_str());
    (void)finish_all();
    const std::string reports = take_reports();
    CHECK(reports.empty(), "%s:\n%s", name.c_str(), reports.c_str());
  }
  set_stream_order({});
}

// Plays an architecture for the rest of the scope.
class WithDevice {
 public:
  explicit WithDevice(int sm) : before_(device()) { device() = device_of(sm); }
  WithDevice(const WithDevice&) = delete;
  WithDevice& operator=(const WithDevice&) = delete;
  ~WithDevice() { device() = before_; }

 private:
  Device before_;
};

}  // namespace cuemu

#define CHECK_LAUNCH(call)                                                      \
  do {                                                                          \
    const cudaError_t launch_error = (call);                                    \
    CHECK(launch_error == cudaSuccess, "%s", cudaGetErrorString(launch_error)); \
  } while (false)
