#include "cuda_on_cpu/managed.h"

#include <algorithm>
#include <map>
#include <utility>

#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"

namespace cuemu {
namespace {

struct Page {
  enum class Place : uint8_t { kNowhere, kHost, kDevice };
  Place place = Place::kNowhere;
  uint64_t arrived = 0;
};

struct Managed {
  size_t num_bytes;
  std::vector<Page> pages;
};

std::map<uintptr_t, Managed>& all_managed() {
  static std::map<uintptr_t, Managed> all;
  return all;
}

std::vector<ManagedCall> calls;
uint64_t arrivals = 0;
size_t on_device = 0;
size_t evicted = 0;

void move(Page& page, Page::Place place) {
  on_device -= page.place == Page::Place::kDevice ? kManagedPage : 0;
  on_device += place == Page::Place::kDevice ? kManagedPage : 0;
  page.place = place;
  page.arrived = ++arrivals;
}

Page* oldest_on_device() {
  Page* oldest = nullptr;
  for (auto& [address, managed] : all_managed()) {
    for (Page& page : managed.pages) {
      if (page.place == Page::Place::kDevice && (oldest == nullptr || page.arrived < oldest->arrived)) {
        oldest = &page;
      }
    }
  }
  return oldest;
}

// The pages that hold the bytes; both null if the bytes are not all of one managed allocation.
std::pair<Page*, Page*> pages_of(const void* address, size_t num_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  auto after = all_managed().upper_bound(begin);
  if (after == all_managed().begin()) {
    return {nullptr, nullptr};
  }
  auto& [base, managed] = *std::prev(after);
  const size_t offset = begin - base;
  if (offset >= managed.num_bytes || num_bytes == 0 || num_bytes > managed.num_bytes - offset) {
    return {nullptr, nullptr};
  }
  Page* first = managed.pages.data();
  return {first + offset / kManagedPage, first + (offset + num_bytes - 1) / kManagedPage + 1};
}

}  // namespace

cudaError_t allocate_managed(void** address, size_t num_bytes) {
  if (num_bytes == 0) {
    return cudaErrorInvalidValue;
  }
  *address = allocate_global(num_bytes);
  const size_t pages = (num_bytes + kManagedPage - 1) / kManagedPage;
  all_managed()[reinterpret_cast<uintptr_t>(*address)] = {num_bytes, std::vector<Page>(pages)};
  return cudaSuccess;
}

bool free_managed(void* address) {
  const auto found = all_managed().find(reinterpret_cast<uintptr_t>(address));
  if (found == all_managed().end()) {
    return false;
  }
  for (Page& page : found->second.pages) {
    move(page, Page::Place::kNowhere);
  }
  all_managed().erase(found);
  return free_global(address);
}

bool is_managed(const void* address) { return pages_of(address, 1).first != nullptr; }

cudaError_t prefetch(const void* address, size_t num_bytes, bool to_device, cudaStream_t stream) {
  const auto [begin, end] = pages_of(address, num_bytes);
  if (begin == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (!device().concurrent_managed_access) {
    return cudaErrorInvalidDevice;
  }
  calls.push_back({ManagedCall::Kind::kPrefetch, address, num_bytes, to_device, {}, stream});
  for (Page* page = begin; page != end; ++page) {
    if (to_device && page->place != Page::Place::kDevice && !make_room(kManagedPage)) {
      continue;  // as on a full device: the page stays where it is
    }
    move(*page, to_device ? Page::Place::kDevice : Page::Place::kHost);
  }
  return cudaSuccess;
}

cudaError_t advise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, bool device_location) {
  if (pages_of(address, num_bytes).first == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (device_location && !device().concurrent_managed_access) {
    return cudaErrorInvalidDevice;
  }
  calls.push_back({ManagedCall::Kind::kAdvise, address, num_bytes, device_location, advice, nullptr});
  return cudaSuccess;
}

size_t plain_bytes() {
  size_t managed_total = 0;
  for (const auto& [address, managed] : all_managed()) {
    managed_total += managed.num_bytes;
  }
  return allocated_bytes() - managed_total;
}

bool make_room(size_t num_bytes) {
  const size_t most = device().total_bytes;
  const size_t plain = plain_bytes();
  if (plain + num_bytes > most) {
    return false;
  }
  while (plain + on_device + num_bytes > most) {
    Page* page = oldest_on_device();
    move(*page, Page::Place::kHost);
    evicted += kManagedPage;
  }
  return true;
}

Residency residency(const void* address) {
  Residency result{0, 0};
  const auto found = all_managed().find(reinterpret_cast<uintptr_t>(address));
  if (found != all_managed().end()) {
    for (const Page& page : found->second.pages) {
      result.device_bytes += page.place == Page::Place::kDevice ? kManagedPage : 0;
      result.host_bytes += page.place == Page::Place::kHost ? kManagedPage : 0;
    }
  }
  return result;
}

size_t managed_bytes_on_device() { return on_device; }

size_t evicted_bytes() { return evicted; }

std::vector<ManagedCall> take_managed_calls() { return std::exchange(calls, {}); }

}  // namespace cuemu
