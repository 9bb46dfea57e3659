#include "cuda/page_store.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace qlora_native::cuda {
namespace {

// The first error of calls made one after the other; those after it are not made.
template <typename... Calls>
cudaError_t in_turn(const Calls&... calls) {
  cudaError_t error = cudaSuccess;
  (void)((error = calls(), error == cudaSuccess) && ...);
  return error;
}

}  // namespace

PageStore::PageStore(std::vector<StateForm> forms, PagePlan plan) : forms_(std::move(forms)), plan_(std::move(plan)) {
  for (const PageChunk& chunk : plan_.chunks) {
    sizes_.push_back(chunk.num_bytes);
    largest_ = std::max(largest_, chunk.num_bytes);
  }
  resident_.resize(sizes_.size());
}

PageStore::~PageStore() {
  for (const auto& events : {fetched_, updated_, {began_, released_}}) {
    for (const cudaEvent_t event : events) {
      if (event != nullptr) {
        (void)cudaEventDestroy(event);
      }
    }
  }
  for (const cudaStream_t stream : {in_, out_}) {
    if (stream != nullptr) {
      (void)cudaStreamDestroy(stream);
    }
  }
}

cudaError_t PageStore::open(bool comes_apart) {
  comes_apart_ = comes_apart;
  return cudaGetDevice(&device_);
}

cudaError_t PageStore::make_streams() {
  if (began_ != nullptr) {
    return cudaSuccess;
  }
  const auto make_event = [](cudaEvent_t& event) { return cudaEventCreateWithFlags(&event, cudaEventDisableTiming); };
  const auto make_stream = [](cudaStream_t& stream) {
    return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  };
  cudaError_t error =
      in_turn([&] { return make_stream(out_); }, [&] { return comes_apart_ ? make_stream(in_) : cudaSuccess; },
              [&] { return make_event(released_); });
  for (auto* events : {&fetched_, &updated_}) {
    events->resize(sizes_.size());
    for (size_t i = 0; i < events->size() && error == cudaSuccess; ++i) {
      error = make_event((*events)[i]);
    }
  }
  return error == cudaSuccess ? make_event(began_) : error;  // the last: all are there
}

void PageStore::wait_for_device() const {
  int current = 0;
  if (cudaGetDevice(&current) == cudaSuccess && current == device_) {
    (void)cudaDeviceSynchronize();
    return;
  }
  // The current device is a thread's own. To set it here and back again would make a context, of hundreds of MiB, on a
  // device that may have none.
  std::thread([this] {
    (void)cudaSetDevice(device_);
    (void)cudaDeviceSynchronize();
  }).join();
}

cudaError_t PageStore::walk(const std::vector<bool>& wanted, int64_t budget_bytes, const Update& update,
                            cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<PageMove> moves = moves_of(wanted, resident_, budget_bytes);
  cudaError_t error = in_turn([&] { return make_streams(); }, [&] { return cudaEventRecord(began_, stream); });
  for (auto next = moves.begin(); next != moves.end() && error == cudaSuccess; ++next) {
    error = move(*next, update, stream);
  }
  // What comes on a stream of its own goes through buffers that belong to the caller's.
  return error == cudaSuccess && in_ != nullptr ? cudaStreamWaitEvent(stream, released_, 0) : error;
}

cudaError_t PageStore::move(const PageMove& next, const Update& update, cudaStream_t stream) {
  const auto chunk = static_cast<size_t>(next.chunk);
  switch (next.action) {
    case PageAction::kFetch:
      return fetch(chunk, stream);
    case PageAction::kUpdate:
      return in_turn([&] { return cudaStreamWaitEvent(stream, fetched_[chunk], 0); },
                     [&] { return update(next.chunk); }, [&] { return cudaEventRecord(updated_[chunk], stream); });
    case PageAction::kRelease:
      return release(chunk);
  }
  return cudaErrorInvalidValue;
}

cudaError_t PageStore::fetch(size_t chunk, cudaStream_t stream) {
  const cudaStream_t in = in_ != nullptr ? in_ : stream;
  resident_[chunk] = true;
  bytes_in_ += sizes_[chunk];
  return in_turn(
      [&] { return cudaStreamWaitEvent(in, began_, 0); }, [&] { return cudaStreamWaitEvent(in, released_, 0); },
      [&] { return move_in(static_cast<int64_t>(chunk), in); }, [&] { return cudaEventRecord(fetched_[chunk], in); });
}

cudaError_t PageStore::release(size_t chunk) {
  resident_[chunk] = false;
  bytes_out_ += sizes_[chunk];
  return in_turn([&] { return cudaStreamWaitEvent(out_, began_, 0); },
                 [&] { return cudaStreamWaitEvent(out_, updated_[chunk], 0); },
                 [&] { return move_out(static_cast<int64_t>(chunk), out_); },
                 [&] { return cudaEventRecord(released_, out_); });
}

cudaError_t PageStore::page_in(cudaStream_t stream) {
  const auto nothing = [](int64_t) { return cudaSuccess; };
  return walk(std::vector<bool>(sizes_.size(), true), plan_.num_bytes, nothing, stream);
}

cudaError_t PageStore::renew(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  cudaError_t error = cudaSuccess;
  for (size_t chunk = 0; chunk < sizes_.size() && error == cudaSuccess; ++chunk) {
    error = resident_[chunk] ? move_in(static_cast<int64_t>(chunk), stream) : cudaSuccess;
  }
  return error;
}

bool PageStore::is_resident() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::find(resident_.begin(), resident_.end(), false) == resident_.end();
}

cudaError_t PageStore::page_out(cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    error = in_turn([&] { return make_streams(); }, [&] { return cudaEventRecord(began_, stream); });
    for (size_t chunk = 0; chunk < sizes_.size() && error == cudaSuccess; ++chunk) {
      error = resident_[chunk] ? release(chunk) : cudaSuccess;
    }
  }
  return error == cudaSuccess ? finish() : error;
}

cudaError_t PageStore::finish() { return out_ == nullptr ? cudaSuccess : cudaStreamSynchronize(out_); }

void PageStore::forget_residency() {
  const std::lock_guard<std::mutex> lock(mutex_);
  resident_.assign(sizes_.size(), false);
}

PageStatistics PageStore::statistics() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  PageStatistics result{plan_.num_bytes, 0, bytes_in_, bytes_out_};
  for (size_t i = 0; i < sizes_.size(); ++i) {
    result.resident_bytes += resident_[i] ? sizes_[i] : 0;
  }
  return result;
}

}  // namespace qlora_native::cuda
