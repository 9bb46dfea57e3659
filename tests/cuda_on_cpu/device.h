// The device that the emulator plays: an architecture's limits, as the CUDA programming guide tabulates them.
#pragma once

#include <cstddef>

namespace cuemu {

struct Device {
  int sm;  // 75, 80, 86, 89, 90, 100 or 120
  int num_sms;
  size_t shared_bytes_per_block;  // with the opt-in, static and dynamic together
  size_t total_bytes;             // of device memory
  bool concurrent_managed_access;
};

// sm_80 at the start; what a test changes holds until it changes it back.
Device& device();

// An sm_`sm` with that architecture's limit on shared memory.
Device device_of(int sm);

}  // namespace cuemu
