#include "cuda_on_cpu/device.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace cuemu {
namespace {

size_t shared_bytes_of(int sm) {
  switch (sm) {
    case 70:
      return 96 * 1024;
    case 75:
      return 64 * 1024;
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * 1024;
    case 90:
    case 100:
    case 103:
    case 110:
      return 227 * 1024;
    default:
      throw std::invalid_argument("sm_" + std::to_string(sm) +
                                  ": expected 70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120 or 121");
  }
}

int current = 0;

std::vector<Device>& devices() {
  static std::vector<Device> all{device_of(80)};
  return all;
}

std::set<std::pair<int, int>>& peers() {
  static std::set<std::pair<int, int>> all;
  return all;
}

}  // namespace

Device device_of(int sm) { return {sm, 8, shared_bytes_of(sm), size_t{1} << 30, true}; }

void set_num_devices(int count) {
  devices().resize(static_cast<size_t>(count), device_of(80));
  peers().clear();
  current = 0;
}

int num_devices() { return static_cast<int>(devices().size()); }

int current_device() { return current; }

void set_current_device(int ordinal) { current = ordinal; }

Device& device() { return device(current); }

Device& device(int ordinal) { return devices().at(static_cast<size_t>(ordinal)); }

bool has_peer_access(int from, int to) { return peers().contains({from, to}); }

void set_peer_access(int from, int to, bool allowed) {
  if (allowed) {
    peers().insert({from, to});
  } else {
    peers().erase({from, to});
  }
}

std::optional<Images>& images() {
  static std::optional<Images> built;
  return built;
}

bool has_image_for(int sm) {
  if (!images().has_value()) {
    return true;
  }
  const auto runs = [sm](int arch) { return arch / 10 == sm / 10 && arch <= sm; };
  const auto compiles = [sm](int arch) { return arch <= sm; };
  return std::any_of(images()->sass.begin(), images()->sass.end(), runs) ||
         std::any_of(images()->ptx.begin(), images()->ptx.end(), compiles);
}

}  // namespace cuemu
