// Paged steps over managed memory and over pinned memory: the bytes of the unpaged CPU op, whatever the order in which
// streams run; and what is moved, when and how often.
#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/adamw_step.h"
#include "cpu/lion_step.h"
#include "cuda/adamw_step.h"
#include "cuda/lion_step.h"
#include "cuda/managed_store.h"
#include "cuda/paged_table.h"
#include "cuda/pinned_store.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/optim_case.h"

using namespace qlora_native;
using cuda::ManagedStore;
using cuda::PageStore;
using cuda::PinnedStore;
using cuemu::ManagedCall;
using cuemu::ManagedCounters;

namespace {

constexpr int64_t kPage = cuemu::kManagedPage;
constexpr int64_t kChunkBytes = 2 * kPage;

enum class Rule : uint8_t { kAdamw, kAdam, kLion };

int moments_of(Rule rule) { return rule == Rule::kLion ? 1 : 2; }

// Small tensors of every form that share chunks, one that is cut into several, one without a gradient.
std::vector<cuemu::TensorSpec> paged_tensors(bool coded) {
  std::vector<cuemu::TensorSpec> specs = cuemu::mixed_tensors();
  specs.push_back({70000, Dtype::kFloat32, false});
  specs.push_back({40000, Dtype::kBfloat16, coded, 1});
  specs.push_back({60000, Dtype::kFloat16, coded});
  specs.push_back({20000, Dtype::kFloat32, !coded});
  return specs;
}

std::vector<StateForm> forms_of(const std::vector<cuemu::TensorSpec>& specs, int moments) {
  std::vector<StateForm> forms;
  for (const cuemu::TensorSpec& spec : specs) {
    forms.push_back({spec.numel, moments, spec.coded});
  }
  return forms;
}

std::unique_ptr<PageStore> make_store(bool managed, std::vector<StateForm> forms) {
  cudaError_t error = cudaSuccess;
  std::unique_ptr<PageStore> store;
  if (managed) {
    store = ManagedStore::make(std::move(forms), kPage, kChunkBytes, error);
  } else {
    store = PinnedStore::make(std::move(forms), kPage, kChunkBytes, error);
  }
  CHECK(error == cudaSuccess && store != nullptr, "%s", cudaGetErrorString(error));
  return store;
}

// The case's tensors, with states in a store.
class PagedCase {
 public:
  PagedCase(cuemu::OptimCase& tensors, Rule rule, bool managed)
      : tensors_(tensors), rule_(rule), store_(make_store(managed, forms_of(tensors.specs(), moments_of(rule)))) {
    auto* pinned = dynamic_cast<PinnedStore*>(store_.get());
    cuda::AddressOf address_of = [this](int64_t, int64_t offset) { return address(offset); };
    std::unique_ptr<PinnedStore::Staging> places;
    if (pinned != nullptr) {
      staging_ = std::make_unique<cuemu::DeviceBuffer<std::byte>>(static_cast<size_t>(pinned->staging_bytes()));
      places = std::make_unique<PinnedStore::Staging>(*pinned, staging_->data());
      address_of = [&places](int64_t chunk, int64_t offset) { return places->address_of(chunk, offset); };
    }
    std::vector<int64_t> row_of(tensors.specs().size());
    for (size_t i = 0; i < row_of.size(); ++i) {
      row_of[i] = static_cast<int64_t>(i);
    }
    table_ = cuda::paged_table(store_->plan(), store_->forms(), row_of, address_of);
    if (pinned != nullptr) {
      pinned->use(places->buffers());
    }
    std::vector<OptimTensor> rows;
    for (const cuda::PagedRow& from : table_.rows) {
      OptimTensor row = tensors.device_rows()[static_cast<size_t>(from.row)];
      row.exp_avg = reinterpret_cast<void*>(from.exp_avg);
      row.exp_avg_sq = reinterpret_cast<void*>(from.exp_avg_sq);
      row.exp_avg_absmax = reinterpret_cast<float*>(from.exp_avg_absmax);
      row.exp_avg_sq_absmax = reinterpret_cast<float*>(from.exp_avg_sq_absmax);
      rows.push_back(row);
    }
    rows_ = std::make_unique<cuemu::DeviceBuffer<OptimTensor>>(rows);
    chunks_ = std::make_unique<cuemu::DeviceBuffer<cuda::OptimChunk>>(table_.chunks);
    for (const cuda::PagedRun& run : table_.runs) {
      wanted_.push_back(run.num_chunks > 0);
    }
  }

  PageStore& store() { return *store_; }
  int64_t num_wanted() const { return std::count(wanted_.begin(), wanted_.end(), true); }

  cudaError_t step(const double* options, const cuda::StepInputs& inputs, const cuemu::StepScalars& scalars,
                   int64_t budget, cudaStream_t stream) {
    const auto launch = [&](const cuda::OptimTable& table) {
      return rule_ == Rule::kLion
                 ? cuda::launch_lion_step(table, options, inputs, scalars.results(), scalars.finished.data(), stream)
                 : cuda::launch_adamw_step(table, options, rule_ == Rule::kAdamw, inputs, scalars.results(),
                                           scalars.finished.data(), stream);
    };
    const auto update = [&](int64_t chunk) { return launch(table_.of(chunk, rows_->data(), chunks_->data())); };
    const cudaError_t error = store_->walk(wanted_, budget, update, stream);
    return error == cudaSuccess && rule_ != Rule::kLion ? launch(table_.counting(rows_->data())) : error;
  }

  // States of the arena to the case's own, for its comparison.
  void give_back() {
    CHECK(store_->finish() == cudaSuccess, "finished");
    for (size_t i = 0; i < tensors_.specs().size(); ++i) {
      const StateForm& form = store_->forms()[i];
      const StatePlace& place = store_->plan().places[i];
      const OptimTensor& row = tensors_.device_rows()[i];
      const int64_t width = form.coded ? 1 : 4;
      const int64_t blocks = ceil_div(form.numel, kStateBlock);
      copy(row.exp_avg, place.exp_avg, width * form.numel);
      copy(row.exp_avg_absmax, place.exp_avg_absmax, 4 * blocks);
      copy(row.exp_avg_sq, place.exp_avg_sq, width * form.numel);
      copy(row.exp_avg_sq_absmax, place.exp_avg_sq_absmax, 4 * blocks);
    }
    store_->forget_residency();
  }

 private:
  uintptr_t address(int64_t offset) const { return reinterpret_cast<uintptr_t>(store_->memory() + offset); }

  void copy(void* to, int64_t offset, int64_t num_bytes) const {
    if (offset != kNoPlace && num_bytes > 0) {
      std::memcpy(to, store_->memory() + offset, static_cast<size_t>(num_bytes));
    }
  }

  cuemu::OptimCase& tensors_;
  Rule rule_;
  std::unique_ptr<cuemu::DeviceBuffer<std::byte>> staging_;
  cuda::PagedTable table_;
  std::unique_ptr<cuemu::DeviceBuffer<OptimTensor>> rows_;
  std::unique_ptr<cuemu::DeviceBuffer<cuda::OptimChunk>> chunks_;
  std::vector<bool> wanted_;
  std::unique_ptr<PageStore> store_;  // goes first, and waits for what uses the others
};

// Two groups, for the CPU op and for the device.
struct Groups {
  explicit Groups(Rule rule) : adamw(rule == Rule::kAdamw) {
    std::vector<double> numbers;
    for (const auto& [lr, beta1, beta2, eps, decay] :
         {std::tuple{1e-2, 0.9, 0.99, 1e-8, 0.1}, std::tuple{3e-3, 0.8, 0.95, 1e-6, 0.0}}) {
      of_adamw.push_back({lr, beta1, beta2, eps, decay, adamw});
      of_lion.push_back({lr, beta1, beta2, decay});
      numbers.insert(numbers.end(), {lr, beta1, beta2});
      if (rule != Rule::kLion) {
        numbers.push_back(eps);
      }
      numbers.push_back(decay);
    }
    device = std::make_unique<cuemu::DeviceBuffer<double>>(numbers);
    is_lion = rule == Rule::kLion;
  }

  void step_on_cpu(const cuemu::OptimCase& tensors, double factor) const {
    if (is_lion) {
      cpu::lion_step(tensors.host(), tensors.count(), of_lion.data(), factor);
    } else {
      cpu::adamw_step(tensors.host(), tensors.count(), of_adamw.data(), factor);
    }
  }

  bool adamw;
  bool is_lion = false;
  std::vector<AdamwOptions> of_adamw;
  std::vector<LionOptions> of_lion;
  std::unique_ptr<cuemu::DeviceBuffer<double>> device;
};

cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "a stream");
  return stream;
}

// Clipped steps, one of them skipped, under a budget of `budget_chunks` times the largest chunk.
void check_steps(Rule rule, bool coded, bool managed, int64_t budget_chunks, const char* order) {
  cuemu::OptimCase tensors(paged_tensors(coded), 5);
  const Groups groups(rule);
  const cuemu::StepScalars scalars;
  scalars.grad_scale.data()[0] = 8.0f;
  const cuda::StepInputs inputs{1.0, 0.5, scalars.grad_scale.data(), nullptr, scalars.norm.data()};
  const cudaStream_t stream = new_stream();
  {
    PagedCase paged(tensors, rule, managed);
    const int64_t budget = budget_chunks * paged.store().largest_chunk();
    CHECK(paged.num_wanted() > 3, "%d chunks", static_cast<int>(paged.num_wanted()));
    CHECK(paged.store().zero(budget, stream) == cudaSuccess, "zero");
    for (const bool finite : {true, false, true}) {
      tensors.new_gradients(8.0f);
      if (finite) {
        const double norm = cpu::gradient_norm(tensors.host(), tensors.count()) / 8.0;
        groups.step_on_cpu(tensors, std::min(1.0, 0.5 / (norm + 1e-6)) / 8.0);
      } else {
        tensors.set_gradient(9, 699, std::numeric_limits<float>::quiet_NaN());
      }
      CHECK_LAUNCH(cuda::launch_gradient_norm(tensors.device(), tensors.workspace(), scalars.norm.data(), stream));
      CHECK_LAUNCH(paged.step(groups.device->data(), inputs, scalars, budget, stream));
      CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "done");  // the next gradients come from the host
      CHECK(scalars.skipped.host()[0] == (finite ? 0.0f : 1.0f), "%s: skipped", order);
    }
    paged.give_back();
    tensors.check_same(order);
  }
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "destroyed");
}

TEST(paged_steps_give_the_bytes_of_the_cpu) {
  for (const Rule rule : {Rule::kAdamw, Rule::kAdam, Rule::kLion}) {
    for (const bool coded : {false, true}) {
      for (const bool managed : {true, false}) {
        check_steps(rule, coded, managed, 3, "at once");
      }
    }
  }
}

TEST(paged_steps_need_no_order_but_their_own) {
  for (const bool managed : {true, false}) {
    cuemu::over_all_stream_orders([&](const char* order) { check_steps(Rule::kAdamw, true, managed, 3, order); });
  }
  for (const int64_t budget_chunks : {1, 2, 100}) {
    check_steps(Rule::kAdamw, false, true, budget_chunks, "budget");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is moved

// Three steps without reading the states between them; what each of the last two moved.
template <typename Look>
void steady_steps(int64_t budget_chunks, Look look) {
  cuemu::over_all_stream_orders([&](const char* order) {
    cuemu::OptimCase tensors(paged_tensors(false), 6);
    const Groups groups(Rule::kAdamw);
    const cuemu::StepScalars scalars;
    const cudaStream_t stream = new_stream();
    {
      PagedCase paged(tensors, Rule::kAdamw, true);
      const int64_t budget = budget_chunks * paged.store().largest_chunk();
      CHECK(paged.store().zero(budget, stream) == cudaSuccess, "zero");
      for (int step = 0; step < 3; ++step) {
        tensors.new_gradients();
        CHECK(cudaDeviceSynchronize() == cudaSuccess, "the step before has ended");
        (void)cuemu::take_managed_counters();
        (void)cuemu::take_managed_calls();
        (void)cuemu::take_launches();
        const size_t queued = cuemu::num_queued();
        CHECK_LAUNCH(paged.step(groups.device->data(), {1.0, 0.0, nullptr, nullptr, nullptr}, scalars, budget, stream));
        CHECK(queued == 0 && (cuemu::num_queued() > 0 || std::string(order) == "at once"), "the host waits in a step");
        CHECK(cudaDeviceSynchronize() == cudaSuccess, "done");
        if (step > 0) {
          look(order, paged, cuemu::take_managed_counters());
        }
      }
    }
    CHECK(cudaStreamDestroy(stream) == cudaSuccess, "destroyed");
  });
}

TEST(in_steady_state_nothing_faults_and_a_page_moves_once_each_way) {
  steady_steps(3, [](const char* order, PagedCase& paged, const ManagedCounters& moved) {
    const PageStore& store = paged.store();
    CHECK(moved.device_faults == 0 && moved.host_faults == 0 && moved.remote_accesses == 0, "%s: faults", order);
    CHECK(moved.most_to_device == 1 && moved.most_to_host == 1, "%s: moved %d times", order, (int)moved.most_to_device);
    CHECK(moved.idle_prefetches == 0 && moved.evicted == 0, "%s: idle prefetches or evictions", order);
    const auto pages = static_cast<uint64_t>(store.plan().num_bytes / kPage);
    CHECK(moved.to_device <= pages && moved.to_device == moved.to_host && moved.to_device > pages / 2,
          "%s: %d of %d pages", order, (int)moved.to_device, (int)pages);
    const cuda::PageStatistics said = store.statistics();
    const size_t there = cuemu::residency(store.memory()).device_bytes;
    CHECK(said.resident_bytes == static_cast<int64_t>(there), "%s: %zu bytes on the device", order, there);
    CHECK(said.num_bytes == store.plan().num_bytes && said.bytes_in - said.bytes_out == said.resident_bytes, "bytes");
  });
}

TEST(what_is_on_the_device_stays_within_the_budget) {
  steady_steps(3, [](const char* order, PagedCase& paged, const ManagedCounters&) {
    const cuemu::WithDevice small(80);  // what is beyond the budget would be evicted
    const PageStore& store = paged.store();
    const cuemu::StepScalars scalars;
    const Groups groups(Rule::kAdamw);
    cuemu::device().total_bytes = cuemu::allocated_bytes() + static_cast<size_t>(3 * store.largest_chunk());
    const cudaStream_t stream = new_stream();
    CHECK_LAUNCH(paged.step(groups.device->data(), {1.0, 0.0, nullptr, nullptr, nullptr}, scalars,
                            3 * store.largest_chunk(), stream));
    CHECK(cudaDeviceSynchronize() == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess, "done");
    const ManagedCounters moved = cuemu::take_managed_counters();
    CHECK(moved.evicted == 0 && moved.device_faults == 0 && moved.remote_accesses == 0, "%s: %d evicted", order,
          (int)moved.evicted);
  });
}

TEST(a_chunk_is_fetched_before_the_one_before_it_is_updated) {
  cuemu::OptimCase tensors(paged_tensors(false), 7);
  const Groups groups(Rule::kAdamw);
  const cuemu::StepScalars scalars;
  PagedCase paged(tensors, Rule::kAdamw, true);
  const int64_t budget = 3 * paged.store().largest_chunk();
  CHECK(paged.store().zero(budget, nullptr) == cudaSuccess, "zero");
  tensors.new_gradients();
  (void)cuemu::take_managed_calls();
  const uint64_t before = cuemu::launches_begun();
  CHECK_LAUNCH(paged.step(groups.device->data(), {1.0, 0.0, nullptr, nullptr, nullptr}, scalars, budget, nullptr));
  std::vector<uint64_t> fetched;  // launches before each chunk's first prefetch
  for (const ManagedCall& call : cuemu::take_managed_calls()) {
    if (call.to_device) {
      CHECK(call.stream == nullptr, "on the caller's stream");
      fetched.push_back(call.launches - before);
    }
  }
  CHECK(fetched.size() > 3 && std::is_sorted(fetched.begin(), fetched.end()), "%zu prefetches", fetched.size());
  CHECK(fetched.back() + 2 <= cuemu::launches_begun() - before,
        "the last one comes before the launch ahead of its own");
}

TEST(everything_on_the_device_needs_no_moves) {
  steady_steps(1000, [](const char* order, PagedCase& paged, const ManagedCounters& moved) {
    CHECK(moved == ManagedCounters{} && paged.store().is_resident(), "%s", order);
  });
}

TEST(a_spike_evicts_and_the_states_return) {
  const cuemu::WithDevice small(80);
  cuemu::OptimCase tensors(paged_tensors(false), 8);
  const Groups groups(Rule::kAdamw);
  const cuemu::StepScalars scalars;
  PagedCase paged(tensors, Rule::kAdamw, true);
  PageStore& store = paged.store();
  const auto arena = static_cast<size_t>(store.plan().num_bytes);
  CHECK(store.zero(store.plan().num_bytes, nullptr) == cudaSuccess && store.is_resident(), "all there");
  (void)cuemu::take_managed_counters();
  cuemu::device().total_bytes = cuemu::allocated_bytes() + arena;
  void* spike = nullptr;
  CHECK(cudaMalloc(&spike, arena / 2) == cudaSuccess, "a spike is no failure");
  CHECK(cuemu::take_managed_counters().evicted > 0, "it took the place of states");
  const auto step = [&](int64_t budget) {
    tensors.new_gradients();
    groups.step_on_cpu(tensors, 1.0);
    CHECK_LAUNCH(paged.step(groups.device->data(), {1.0, 0.0, nullptr, nullptr, nullptr}, scalars, budget, nullptr));
    return cuemu::take_managed_counters();
  };
  const ManagedCounters late = step(store.plan().num_bytes);
  CHECK(late.device_faults == 0 && late.remote_accesses > 0, "what was evicted is read over the bus");
  CHECK(store.page_out(nullptr) == cudaSuccess && cuemu::residency(store.memory()).device_bytes == 0, "all out");
  CHECK(store.statistics().resident_bytes == 0 && !store.is_resident(), "and said so");
  (void)cuemu::take_managed_counters();
  const ManagedCounters pressed = step(3 * store.largest_chunk());
  CHECK(pressed.device_faults == 0 && pressed.remote_accesses == 0 && pressed.evicted == 0, "under pressure");
  CHECK(cudaFree(spike) == cudaSuccess && store.page_in(nullptr) == cudaSuccess && store.is_resident(), "they return");
  (void)cuemu::take_managed_counters();
  CHECK(step(store.plan().num_bytes) == ManagedCounters{}, "and stay");
  paged.give_back();
  tensors.check_same("after the spike");
}

TEST(memory_is_given_back_after_what_uses_it) {
  for (const bool managed : {true, false}) {
    const size_t before = cuemu::allocated_bytes();
    cuemu::set_stream_order({true, 3});
    {
      cuemu::OptimCase tensors(paged_tensors(false), 9);
      const Groups groups(Rule::kAdamw);
      const cuemu::StepScalars scalars;
      PagedCase paged(tensors, Rule::kAdamw, managed);
      tensors.new_gradients();
      CHECK_LAUNCH(paged.step(groups.device->data(), {1.0, 0.0, nullptr, nullptr, nullptr}, scalars,
                              3 * paged.store().largest_chunk(), nullptr));
      CHECK(cuemu::num_queued() > 0, "the step has not ended");
    }  // a report shows if the store frees under a launch
    cuemu::set_stream_order({});
    CHECK(cuemu::allocated_bytes() == before, "%zu bytes are left", cuemu::allocated_bytes() - before);
  }
  (void)cuemu::take_managed_counters();
}

TEST(a_device_without_concurrent_access_is_recognized) {
  const cuemu::WithDevice windows(86);
  CHECK(cuda::has_concurrent_managed_access(0), "it has");
  cuemu::device().concurrent_managed_access = false;
  CHECK(!cuda::has_concurrent_managed_access(0) && !cuda::has_concurrent_managed_access(7), "it has not");
  cudaError_t error = cudaSuccess;
  CHECK(ManagedStore::make({{1000, 2, false}}, kPage, kChunkBytes, error) == nullptr && error != cudaSuccess,
        "no store");
  (void)cudaGetLastError();
}

}  // namespace
