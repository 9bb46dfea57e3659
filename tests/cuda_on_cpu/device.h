// The devices that the emulator plays: an architecture's limits, as the CUDA programming guide tabulates them.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

namespace cuemu {

struct Device {
  int sm;  // 70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120 or 121
  int num_sms;
  size_t shared_bytes_per_block;  // with the opt-in, static and dynamic together
  size_t total_bytes;             // of device memory
  bool concurrent_managed_access;
};

// An sm_`sm` with that architecture's limit on shared memory.
Device device_of(int sm);

inline constexpr int kEveryDevice = -1;  // the owner of memory that no device owns

// One device at the start. Memory, streams and events belong to the device that is current when they are made.
void set_num_devices(int count);  // makes device 0 current, and forgets access between devices
int num_devices();
int current_device();
void set_current_device(int ordinal);

// Makes a device the current one for the rest of the scope.
class WithCurrentDevice {
 public:
  explicit WithCurrentDevice(int ordinal) : before_(current_device()) { set_current_device(ordinal); }
  WithCurrentDevice(const WithCurrentDevice&) = delete;
  WithCurrentDevice& operator=(const WithCurrentDevice&) = delete;
  ~WithCurrentDevice() { set_current_device(before_); }

 private:
  int before_;
};

// The current device and any; sm_80 at the start. What a test changes holds until it changes it back.
Device& device();
Device& device(int ordinal);

// Whether kernels of device `from` may access memory of device `to`.
bool has_peer_access(int from, int to);
void set_peer_access(int from, int to, bool allowed);

// What a build compiled for: SASS runs on its own major architecture from its minor one on, PTX on all later ones.
struct Images {
  std::vector<int> sass, ptx;
};

// The kernels' images; nothing (as at the start): those of every device.
std::optional<Images>& images();
bool has_image_for(int sm);

}  // namespace cuemu
