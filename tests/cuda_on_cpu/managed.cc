#include "cuda_on_cpu/managed.h"

#include <algorithm>
#include <csignal>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/global_memory.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/page_guard.h"

namespace cuemu {
namespace {

struct Page {
  enum class Place : uint8_t { kNowhere, kHost, kDevice };
  Place place = Place::kNowhere;
  bool open = false;  // to the processor
  bool prefers_host = false;
  bool mapped_on_device = false;  // by cudaMemAdviseSetAccessedBy
  uint32_t moved_to_device = 0;
  uint32_t moved_to_host = 0;
  uint64_t arrived = 0;
};

using Place = Page::Place;

struct Managed {
  std::byte* memory;
  size_t num_bytes;
  std::vector<Page> pages;

  size_t bytes_of(size_t page) const { return std::min(kManagedPage, num_bytes - page * kManagedPage); }
};

// A run of pages of one allocation; empty if what was asked for does not lie in one.
struct Pages {
  Managed* managed = nullptr;
  size_t begin = 0, end = 0;
};

std::map<uintptr_t, Managed> all_managed;
std::map<uintptr_t, size_t> freed;  // addresses stay taken, so that whoever goes on using them is seen
std::mutex mutex;                   // of everything here; a touch is felt by the thread that makes it
std::vector<ManagedCall> calls;
ManagedCounters counted{};
Toucher toucher = Toucher::kHost;
std::string touched_after_free;
uint64_t arrivals = 0;
size_t on_device = 0;

void close(Managed& managed, size_t page) {
  if (std::exchange(managed.pages[page].open, false)) {
    close_pages(managed.memory + page * kManagedPage, managed.bytes_of(page));
  }
}

void close_all() {
  for (auto& [address, managed] : all_managed) {
    const auto is_open = [](const Page& page) { return page.open; };
    if (std::any_of(managed.pages.begin(), managed.pages.end(), is_open)) {
      close_pages(managed.memory, managed.num_bytes);
      std::for_each(managed.pages.begin(), managed.pages.end(), [](Page& page) { page.open = false; });
    }
  }
}

void move(Managed& managed, size_t number, Place place) {
  Page& page = managed.pages[number];
  close(managed, number);
  on_device -= page.place == Place::kDevice ? kManagedPage : 0;
  on_device += place == Place::kDevice ? kManagedPage : 0;
  if (place == Place::kDevice) {
    ++counted.to_device;
    counted.most_to_device = std::max<uint64_t>(counted.most_to_device, ++page.moved_to_device);
  } else if (page.place == Place::kDevice) {
    ++counted.to_host;
    counted.most_to_host = std::max<uint64_t>(counted.most_to_host, ++page.moved_to_host);
  }
  page.place = place;
  page.arrived = ++arrivals;
}

Pages pages_of(const void* address, size_t num_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const auto after = all_managed.upper_bound(begin);
  if (after == all_managed.begin()) {
    return {};
  }
  auto& [base, managed] = *std::prev(after);
  const size_t offset = begin - base;
  if (offset >= managed.num_bytes || num_bytes == 0 || num_bytes > managed.num_bytes - offset) {
    return {};
  }
  return {&managed, offset / kManagedPage, (offset + num_bytes - 1) / kManagedPage + 1};
}

void evict_oldest() {
  Pages oldest;
  for (auto& [address, managed] : all_managed) {
    for (size_t i = 0; i < managed.pages.size(); ++i) {
      const bool older =
          oldest.managed == nullptr || managed.pages[i].arrived < oldest.managed->pages[oldest.begin].arrived;
      if (managed.pages[i].place == Place::kDevice && older) {
        oldest = {&managed, i, i + 1};
      }
    }
  }
  move(*oldest.managed, oldest.begin, Place::kHost);
  ++counted.evicted;
}

bool make_room_now(size_t num_bytes) {
  const size_t most = device().total_bytes;
  const size_t plain = allocated_bytes();
  if (plain + num_bytes > most) {
    return false;
  }
  while (plain + on_device + num_bytes > most) {
    evict_oldest();
  }
  return true;
}

// A kernel touches a page that is not on the device. Where advice has mapped it, the access crosses the bus; else the
// kernel stalls until the page has come, or until the mapping has been made where the page prefers the host.
void touch_from_device(Managed& managed, size_t number) {
  Page& page = managed.pages[number];
  const bool mapped = page.place == Place::kHost && page.mapped_on_device;
  counted.device_faults += mapped ? 0 : 1;
  if (mapped || page.prefers_host || !make_room_now(kManagedPage)) {
    ++counted.remote_accesses;
    page.place = Place::kHost;
  } else {
    move(managed, number, Place::kDevice);
  }
}

void touch(Managed& managed, size_t number) {
  Page& page = managed.pages[number];
  if (toucher == Toucher::kDevice && page.place != Place::kDevice) {
    touch_from_device(managed, number);
  } else if (toucher == Toucher::kHost && page.place != Place::kHost) {
    counted.host_faults += page.place == Place::kDevice ? 1 : 0;
    move(managed, number, Place::kHost);
  } else if (page.place == Place::kNowhere && toucher != Toucher::kInspector) {
    move(managed, number,
         toucher == Toucher::kCopyToDevice && make_room_now(kManagedPage) ? Place::kDevice : Place::kHost);
  }
  page.open = true;
  open_pages(managed.memory + number * kManagedPage, managed.bytes_of(number));
}

bool feel(void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (toucher == Toucher::kHost && report_host_touch(address)) {
    return true;
  }
  // The red zone behind the last byte shares a page of the processor with it.
  const auto first_of_page = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) / 4096 * 4096);
  if (const Pages pages = pages_of(first_of_page, 1); pages.managed != nullptr) {
    touch(*pages.managed, pages.begin);
    return true;
  }
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  const auto after = freed.upper_bound(wanted);
  if (toucher == Toucher::kHost || after == freed.begin() ||
      wanted - std::prev(after)->first >= std::prev(after)->second) {
    return false;
  }
  const auto& [base, num_bytes] = *std::prev(after);
  touched_after_free = "use after free: byte " + std::to_string(wanted - base) + " of " + std::to_string(num_bytes) +
                       " bytes of managed memory that cudaFree has taken back";
  open_pages(reinterpret_cast<void*>(base), num_bytes);  // what runs goes on, and is reported at its end
  return true;
}

}  // namespace

cudaError_t allocate_managed(void** address, size_t num_bytes) {
  if (num_bytes == 0) {
    return cudaErrorInvalidValue;
  }
  *address = allocate_global(num_bytes, 0, kManagedPage, kEveryDevice);
  feel_touches(feel);
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t pages = (num_bytes + kManagedPage - 1) / kManagedPage;
  all_managed[reinterpret_cast<uintptr_t>(*address)] = {static_cast<std::byte*>(*address), num_bytes,
                                                        std::vector<Page>(pages)};
  close_pages(*address, num_bytes);
  return cudaSuccess;
}

bool free_managed(void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = all_managed.find(reinterpret_cast<uintptr_t>(address));
  if (found == all_managed.end()) {
    return false;
  }
  const Managed& managed = found->second;
  on_device -=
      kManagedPage * static_cast<size_t>(std::count_if(managed.pages.begin(), managed.pages.end(),
                                                       [](const Page& page) { return page.place == Place::kDevice; }));
  const size_t num_bytes = managed.num_bytes;
  all_managed.erase(found);
  free_global(address);
  freed[reinterpret_cast<uintptr_t>(address)] = reserve_pages(address, num_bytes) ? num_bytes : 0;
  return true;
}

cudaError_t prefetch(const void* address, size_t num_bytes, bool to_device, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Pages pages = pages_of(address, num_bytes);
  if (pages.managed == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (!device().concurrent_managed_access) {
    return cudaErrorInvalidDevice;
  }
  calls.push_back({ManagedCall::Kind::kPrefetch, address, num_bytes, to_device, {}, stream, launches_begun()});
  const Place place = to_device ? Place::kDevice : Place::kHost;
  for (size_t i = pages.begin; i < pages.end; ++i) {
    if (pages.managed->pages[i].place == place) {
      ++counted.idle_prefetches;
    } else if (!to_device || make_room_now(kManagedPage)) {  // on a full device the page stays where it is
      move(*pages.managed, i, place);
    }
  }
  return cudaSuccess;
}

cudaError_t advise(const void* address, size_t num_bytes, cudaMemoryAdvise advice, bool device_location) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Pages pages = pages_of(address, num_bytes);
  if (pages.managed == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (device_location && !device().concurrent_managed_access) {
    return cudaErrorInvalidDevice;
  }
  calls.push_back({ManagedCall::Kind::kAdvise, address, num_bytes, device_location, advice, nullptr, launches_begun()});
  for (size_t i = pages.begin; i < pages.end; ++i) {
    Page& page = pages.managed->pages[i];
    if (advice == cudaMemAdviseSetPreferredLocation || advice == cudaMemAdviseUnsetPreferredLocation) {
      page.prefers_host = advice == cudaMemAdviseSetPreferredLocation && !device_location;
    } else if (device_location && (advice == cudaMemAdviseSetAccessedBy || advice == cudaMemAdviseUnsetAccessedBy)) {
      page.mapped_on_device = advice == cudaMemAdviseSetAccessedBy;
    }
  }
  return cudaSuccess;
}

void close_to_host(bool closed) {
  catch_faults();  // first: feel_touches() asks before it
  feel_touches(feel);
  set_closed_to_host(closed);
}

void enter(Toucher next) {
  const std::lock_guard<std::mutex> lock(mutex);
  toucher = next;
  close_all();
  open_device_memory();
}

std::string leave() {
  const std::lock_guard<std::mutex> lock(mutex);
  toucher = Toucher::kHost;
  close_all();
  close_device_memory();
  if (!touched_after_free.empty()) {
    for (const auto& [base, num_bytes] : freed) {
      close_pages(reinterpret_cast<void*>(base), num_bytes);
    }
  }
  return std::exchange(touched_after_free, {});
}

bool make_room(size_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  return make_room_now(num_bytes);
}

Residency residency(const void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  Residency result{0, 0};
  const auto found = all_managed.find(reinterpret_cast<uintptr_t>(address));
  if (found != all_managed.end()) {
    for (const Page& page : found->second.pages) {
      result.device_bytes += page.place == Place::kDevice ? kManagedPage : 0;
      result.host_bytes += page.place == Place::kHost ? kManagedPage : 0;
    }
  }
  return result;
}

size_t managed_bytes_on_device() { return on_device; }

ManagedCounters take_managed_counters() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto& [address, managed] : all_managed) {
    for (Page& page : managed.pages) {
      page.moved_to_device = page.moved_to_host = 0;
    }
  }
  return std::exchange(counted, {});
}

std::vector<ManagedCall> take_managed_calls() { return std::exchange(calls, {}); }

}  // namespace cuemu
