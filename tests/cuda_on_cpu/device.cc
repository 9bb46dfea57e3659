#include "cuda_on_cpu/device.h"

#include <stdexcept>
#include <string>

namespace cuemu {
namespace {

size_t shared_bytes_of(int sm) {
  switch (sm) {
    case 75:
      return 64 * 1024;
    case 80:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    case 90:
    case 100:
      return 227 * 1024;
    default:
      throw std::invalid_argument("sm_" + std::to_string(sm) + ": expected 75, 80, 86, 89, 90, 100 or 120");
  }
}

}  // namespace

Device device_of(int sm) { return {sm, 8, shared_bytes_of(sm), size_t{1} << 30, true}; }

Device& device() {
  static Device current = device_of(80);
  return current;
}

}  // namespace cuemu
