#include "cuda_on_cpu/streams.h"

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <utility>

#include "cuda_on_cpu/device.h"

struct CUstream_st {
  struct Queued {
    std::function<cudaError_t()> work;
    std::vector<cuemu::TaskRef> after;
    cuemu::TaskRef task;
  };

  bool waits_for_default = false;
  bool is_default = false;
  int ordinal = 0;
  std::deque<Queued> queue;
  uint64_t rank = 0;

  bool is_ready() const {
    const auto done = [](const cuemu::TaskRef& task) { return task->is_done; };
    return !queue.empty() && std::all_of(queue.front().after.begin(), queue.front().after.end(), done);
  }
};

namespace cuemu {
namespace {

constexpr uint64_t kTurn = 4;  // pieces of work after which a stream's rank is drawn anew, on average

StreamOrder current{false, 0};
std::mt19937_64 random_source;

std::vector<cudaStream_t>& streams() {
  static std::vector<cudaStream_t> all;
  return all;
}

CUstream_st& default_stream() {
  static std::map<int, CUstream_st> all;
  CUstream_st& stream = all[current_device()];
  if (!std::exchange(stream.is_default, true)) {
    stream.ordinal = current_device();
    streams().push_back(&stream);
  }
  return stream;
}

CUstream_st& resolve(cudaStream_t stream) { return is_default(stream) ? default_stream() : *stream; }

void draw_rank(CUstream_st& stream) { stream.rank = current.is_late ? random_source() : 0; }

cudaError_t run_front(CUstream_st& stream) {
  CUstream_st::Queued next = std::move(stream.queue.front());
  stream.queue.pop_front();
  const cudaError_t error = next.work();
  next.task->is_done = true;
  next.task->ended = std::chrono::steady_clock::now();
  return error;
}

// Until `is_done`. What is waited for was queued before, so that some stream can always go on.
cudaError_t run_until(const std::function<bool()>& is_done) {
  cudaError_t first = cudaSuccess;
  while (!is_done()) {
    CUstream_st* chosen = nullptr;
    for (const cudaStream_t stream : streams()) {
      if (stream->is_ready() && (chosen == nullptr || stream->rank > chosen->rank)) {
        chosen = stream;
      }
    }
    const cudaError_t error = run_front(*chosen);
    if (random_source() % kTurn == 0) {
      draw_rank(*chosen);
    }
    first = first == cudaSuccess ? error : first;
  }
  return first;
}

}  // namespace

const std::vector<StreamOrder>& all_stream_orders() {
  static const std::vector<StreamOrder> all = [] {
    std::vector<StreamOrder> orders{{false, 0}};
    for (uint64_t seed = 1; seed <= 12; ++seed) {
      orders.push_back({true, seed});
    }
    return orders;
  }();
  return all;
}

void set_stream_order(StreamOrder order) {
  (void)finish_all();
  current = order;
  random_source.seed(order.seed);
  for (const cudaStream_t stream : streams()) {
    draw_rank(*stream);
  }
}

bool is_default(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

bool exists(cudaStream_t stream) {
  return is_default(stream) || std::find(streams().begin(), streams().end(), stream) != streams().end();
}

cudaStream_t make_stream(bool waits_for_default) {
  auto* stream = new CUstream_st;
  stream->waits_for_default = waits_for_default;
  stream->ordinal = current_device();
  draw_rank(*stream);
  streams().push_back(stream);
  return stream;
}

void destroy(cudaStream_t stream) {
  (void)finish(stream);
  std::erase(streams(), stream);
  delete stream;
}

int device_of_stream(cudaStream_t stream) { return resolve(stream).ordinal; }

cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work, TaskRef also, TaskRef& task) {
  task = std::make_shared<Task>();
  if (!current.is_late) {
    const cudaError_t error = work();
    *task = {true, std::chrono::steady_clock::now()};
    return error;
  }
  CUstream_st& target = resolve(stream);  // before the loop over streams, which it may add to
  CUstream_st::Queued queued{std::move(work), {}, task};
  if (also != nullptr) {
    queued.after.push_back(std::move(also));
  }
  for (const cudaStream_t other : streams()) {
    const bool orders = other->ordinal == target.ordinal && ((target.is_default && other->waits_for_default) ||
                                                             (target.waits_for_default && other->is_default));
    if (orders && !other->queue.empty()) {
      queued.after.push_back(other->queue.back().task);
    }
  }
  target.queue.push_back(std::move(queued));
  return cudaSuccess;
}

cudaError_t finish(cudaStream_t stream) {
  const CUstream_st& target = resolve(stream);
  return run_until([&target] { return target.queue.empty(); });
}

cudaError_t finish(const TaskRef& task) {
  return run_until([&task] { return task->is_done; });
}

cudaError_t finish_all() {
  return run_until([] { return num_queued() == 0; });
}

size_t num_queued() {
  return std::accumulate(streams().begin(), streams().end(), size_t{0},
                         [](size_t sum, cudaStream_t stream) { return sum + stream->queue.size(); });
}

size_t num_queued(cudaStream_t stream) { return resolve(stream).queue.size(); }

}  // namespace cuemu
