#include "cuda_on_cpu/address_space.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <map>
#include <vector>

#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/builtins.h"
#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/visibility.h"

namespace cuemu {
namespace {

struct Span {
  uintptr_t begin;
  size_t num_bytes;

  bool holds(uintptr_t address) const { return address - begin < num_bytes; }
};

constexpr size_t kNear = 64 * 1024;  // bytes behind an allocation that are its own guard, at least

bool is_strict = true;
int running_on = 0;
Span parameters{0, 0};
Span call{0, 0};

std::map<uintptr_t, Range>& ranges() {
  static std::map<uintptr_t, Range> all;
  return all;
}

// The ranges that were found last, by the address's 256 bytes: kernels access few of them over and over.
std::array<Range*, 256> recent{};

Range* find(uintptr_t address) {
  Range*& kept = recent[address / 256 % recent.size()];
  if (kept != nullptr && address - kept->begin < kept->num_bytes) {
    return kept;
  }
  const auto after = ranges().upper_bound(address);
  if (after == ranges().begin() || address - std::prev(after)->first >= std::prev(after)->second.num_bytes) {
    return nullptr;
  }
  return kept = &std::prev(after)->second;
}

void erase(std::map<uintptr_t, Range>::iterator range) {
  recent.fill(nullptr);
  forget_writers(range->second);
  ranges().erase(range);
}

// Code, constants and variables of the program and its libraries: for a kernel, instructions and constant memory.
bool is_in_image(uintptr_t address) {
  static std::vector<Span> images;
  static Span last{0, 0};
  if (last.holds(address)) {
    return true;
  }
  const auto known = [address] {
    const auto found =
        std::find_if(images.begin(), images.end(), [=](const Span& span) { return span.holds(address); });
    last = found != images.end() ? *found : last;
    return found != images.end();
  };
  if (known()) {
    return true;
  }
  images.clear();  // a library may have been loaded since
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type == PT_LOAD) {
            images.push_back({info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, info->dlpi_phdr[i].p_memsz});
          }
        }
        return 0;
      },
      nullptr);
  return known();
}

// threadIdx and its like, which kernels read most: in the variables of the program or library that this is linked into.
bool is_own_variable(uintptr_t address) {
  static const Span variables = [] {
    Span found{reinterpret_cast<uintptr_t>(&self), sizeof(self)};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* span) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const Span segment{info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, info->dlpi_phdr[i].p_memsz};
            if (info->dlpi_phdr[i].p_type == PT_LOAD && segment.holds(reinterpret_cast<uintptr_t>(&self))) {
              *static_cast<Span*>(span) = segment;
            }
          }
          return 0;
        },
        &found);
    return found;
  }();
  return variables.holds(address);
}

bool has_red_zones(const Range& range) {
  return range.kind == Kind::kManaged || (range.kind == Kind::kDevice && range.owner != kEveryDevice);
}

std::string words_of_mapping(uintptr_t wanted) {
  std::string words = "an address where nothing lies";
  if (std::FILE* maps = std::fopen("/proc/self/maps", "r"); maps != nullptr) {
    char line[512];
    while (std::fgets(line, sizeof(line), maps) != nullptr) {
      uintptr_t begin = 0;
      uintptr_t end = 0;
      char name[300] = "";
      if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*s %*s %*s %*s %299s", &begin, &end, name) >= 2 &&
          wanted >= begin && wanted < end) {
        const std::string_view kind = name;
        words = kind == "[stack]"                  ? "the stack of the host's thread"
                : kind.empty() || kind == "[heap]" ? "pageable memory of the host"
                                                   : "host memory of " + std::string(kind);
        break;
      }
    }
    std::fclose(maps);
  }
  return words;
}

std::string words_of(const Range& range, uintptr_t address) {
  static constexpr const char* kNames[] = {"memory of the device", "managed memory", "pinned memory",
                                           "memory of the host", "memory that cudaFree has taken back"};
  return "byte " + std::to_string(address - range.begin) + " of " + std::to_string(range.num_bytes) + " bytes of " +
         kNames[static_cast<size_t>(range.kind)];
}

void check_range(Range& range, uintptr_t address, size_t num_bytes, Access access, const char* verb, Where where) {
  if (address + num_bytes > range.begin + range.num_bytes) {
    fail_illegal(where, "%s: %zu bytes at byte %zu of a device allocation of %zu bytes", verb, num_bytes,
                 static_cast<size_t>(address - range.begin), range.num_bytes);
  }
  if (range.kind == Kind::kHost || range.kind == Kind::kFreed) {
    fail_illegal(where, "%s of %#" PRIxPTR ", which is %s", verb, address, words_of(range, address).c_str());
  }
  if (range.kind == Kind::kDevice && range.owner != kEveryDevice && range.owner != running_on &&
      !has_peer_access(running_on, range.owner)) {
    fail_illegal(where, "%s of %#" PRIxPTR ", memory of device %d, by a kernel of device %d without peer access", verb,
                 address, range.owner, running_on);
  }
  note_visible(range, address - range.begin, num_bytes, access, verb, where);
}

}  // namespace

void add_range(const void* address, size_t num_bytes, Kind kind, int owner) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (const Range* same = find(begin);
      same != nullptr && same->begin == begin && same->num_bytes == num_bytes && same->kind == kind) {
    return;
  }
  auto next = ranges().lower_bound(begin);
  if (next != ranges().begin() && std::prev(next)->first + std::prev(next)->second.num_bytes > begin) {
    --next;
  }
  while (next != ranges().end() && next->first < begin + num_bytes) {
    erase(next++);
  }
  if (num_bytes > 0) {
    ranges()[begin] = {begin, num_bytes, kind, owner};
  }
}

void forget_range(const void* address) {
  const auto found = ranges().find(reinterpret_cast<uintptr_t>(address));
  if (found != ranges().end()) {
    erase(found);
  }
}

void set_strict(bool strict) { is_strict = strict; }

void begin_addresses(int ordinal, const void* parameter_block, size_t num_parameter_bytes, const void* call_object,
                     size_t num_call_bytes) {
  running_on = ordinal;
  parameters = {reinterpret_cast<uintptr_t>(parameter_block), num_parameter_bytes};
  call = {reinterpret_cast<uintptr_t>(call_object), num_call_bytes};
}

void check_global(const void* address, size_t num_bytes, Access access, const char* verb, Where where) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  if (self == nullptr || self->fiber.holds(address) || is_own_variable(wanted)) {
    return;
  }
  if (parameters.holds(wanted) || call.holds(wanted)) {  // perhaps in the place of a tensor that is gone
    return;
  }
  if (Range* range = find(wanted); range != nullptr) {
    if (global_bytes().counts) {
      (access == Access::kRead ? global_bytes().read : global_bytes().written) += num_bytes;
    }
    check_range(*range, wanted, num_bytes, access, verb, where);
    return;
  }
  const auto after = ranges().upper_bound(wanted);
  if (after != ranges().end() && has_red_zones(after->second) && wanted + num_bytes > after->first - kRedZone) {
    fail_illegal(where, "%s: %zu bytes that begin %zu bytes before a device allocation", verb, num_bytes,
                 static_cast<size_t>(after->first - wanted));
  }
  if (after != ranges().begin() && has_red_zones(std::prev(after)->second)) {
    const Range& before = std::prev(after)->second;
    if (wanted < before.begin + before.num_bytes + kNear) {
      fail_illegal(where, "%s: %zu bytes at byte %zu, past the end of a device allocation of %zu bytes", verb,
                   num_bytes, static_cast<size_t>(wanted - before.begin), before.num_bytes);
    }
  }
  if (is_strict && !is_in_image(wanted)) {
    fail_illegal(where, "%s of %#" PRIxPTR ", which is %s: a kernel reaches device, managed and pinned memory", verb,
                 wanted, words_of_mapping(wanted).c_str());
  }
}

std::string wrong_bytes(const void* address, size_t num_bytes) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  const Range* range = num_bytes > 0 ? find(wanted) : nullptr;
  if (range == nullptr || (range->kind != Kind::kFreed && wanted + num_bytes <= range->begin + range->num_bytes)) {
    return {};
  }
  return std::to_string(num_bytes) + " bytes at " + words_of(*range, wanted);
}

const Range* range_of(const void* address) { return find(reinterpret_cast<uintptr_t>(address)); }

void fail_fault(const void* address, Where where) {
  if (self == nullptr) {
    return;
  }
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  const Range* range = find(wanted);
  const std::string words = range != nullptr ? words_of(*range, wanted) : words_of_mapping(wanted);
  fail_illegal(where, "access of %p, which is %s", address, words.c_str());
}

}  // namespace cuemu
