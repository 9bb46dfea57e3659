#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/adamw_step.h"
#include "cuda/lion_step.h"
#include "cuda/managed_store.h"
#include "cuda/paged_table.h"
#include "cuda/pinned_store.h"
#include "cuda/python/errors.h"
#include "cuda/python/optim_table.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using cuda::ManagedStore;
using cuda::PageStore;
using cuda::PinnedStore;
using Forms = std::vector<std::tuple<int64_t, int, bool>>;

template <typename Store>
std::shared_ptr<Store> make_store(const Forms& forms, int64_t page_bytes, int64_t chunk_bytes) {
  std::vector<StateForm> checked;
  for (const auto& [numel, moments, coded] : forms) {
    require(numel >= 0 && numel < int64_t{1} << 60 && (moments == 1 || moments == 2),
            "a form is (" + std::to_string(numel) + ", " + std::to_string(moments) +
                ", ..): expected a number of elements and 1 or 2 moments.");
    checked.push_back({numel, moments, coded});
  }
  cudaError_t error = cudaSuccess;
  const py::gil_scoped_release unlocked;  // here: a guard of the whole call would hold while pybind11 lists the store
  std::shared_ptr<Store> store = Store::make(checked, page_bytes, chunk_bytes, error);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    throw std::runtime_error("paging: " + std::to_string(plan_pages(checked, page_bytes, chunk_bytes).num_bytes) +
                             " bytes of " + (std::is_same_v<Store, ManagedStore> ? "managed" : "pinned host") +
                             " memory could not be had: CUDA gave " + cudaGetErrorName(error) + ".");
  }
  return store;
}

std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> places_of(const PageStore& store) {
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> places;
  for (const StatePlace& place : store.plan().places) {
    places.emplace_back(place.exp_avg, place.exp_avg_sq, place.exp_avg_absmax, place.exp_avg_sq_absmax);
  }
  return places;
}

py::buffer_info buffer_of(const PageStore& store) {
  return {store.memory(), 1, py::format_descriptor<uint8_t>::format(), 1, {store.plan().num_bytes}, {1}};
}

// The table of a step over a store, and where its chunks go.
class StoreTable {
 public:
  StoreTable(std::shared_ptr<PageStore> store, const std::vector<int64_t>& row_of, Address staging)
      : store_(std::move(store)), pinned_(dynamic_cast<PinnedStore*>(store_.get())) {
    require(store_ != nullptr, "the store is None: expected a ManagedStore or a PinnedStore.");
    require(row_of.size() == store_->forms().size(), std::to_string(row_of.size()) + " rows, but the store has " +
                                                         std::to_string(store_->forms().size()) + " tensors.");
    if (pinned_ != nullptr) {
      PinnedStore::Staging places(*pinned_, pointer<std::byte>(staging, pinned_->staging_bytes(), "staging"));
      const auto address = [&places](int64_t chunk, int64_t offset) { return places.address_of(chunk, offset); };
      table_ = cuda::paged_table(store_->plan(), store_->forms(), row_of, address);
      buffers_ = places.buffers();
    } else {
      const auto address = [this](int64_t, int64_t offset) {
        return reinterpret_cast<uintptr_t>(store_->memory() + offset);
      };
      table_ = cuda::paged_table(store_->plan(), store_->forms(), row_of, address);
    }
    for (const cuda::PagedRun& run : table_.runs) {
      wanted_.push_back(run.num_chunks > 0);
    }
  }

  std::vector<std::tuple<int64_t, Address, Address, Address, Address>> rows() const {
    std::vector<std::tuple<int64_t, Address, Address, Address, Address>> rows;
    for (const cuda::PagedRow& row : table_.rows) {
      rows.emplace_back(row.row, row.exp_avg, row.exp_avg_sq, row.exp_avg_absmax, row.exp_avg_sq_absmax);
    }
    return rows;
  }

  std::vector<std::pair<int32_t, int32_t>> chunks() const {
    std::vector<std::pair<int32_t, int32_t>> chunks;
    for (const cuda::OptimChunk& chunk : table_.chunks) {
      chunks.emplace_back(chunk.tensor, chunk.index);
    }
    return chunks;
  }

  void adamw_step(Address tensors, Address chunks, int64_t budget_bytes, Address options, int64_t num_groups,
                  bool decoupled, double grad_factor, double max_norm, Address grad_scale, Address found_inf,
                  Address norm, Address grad_norm, Address skipped, Address finished, Address stream) {
    const cuda::StepInputs inputs = checked_inputs(grad_factor, max_norm, grad_scale, found_inf, norm);
    const cuda::StepResults results = checked_results(grad_norm, skipped);
    const auto* rows = pointer<const double>(options, num_groups * cuda::kAdamwRow, "options");
    auto* count = pointer<uint32_t>(finished, 1, "finished");
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    const auto launch = [&](const cuda::OptimTable& table) {
      return cuda::launch_adamw_step(table, rows, decoupled, inputs, results, count, on);
    };
    step("adamw_step", tensors, chunks, budget_bytes, on, launch);
    check_cuda(launch(table_.counting(reinterpret_cast<const OptimTensor*>(tensors))), "adamw_step");
  }

  void lion_step(Address tensors, Address chunks, int64_t budget_bytes, Address options, int64_t num_groups,
                 double grad_factor, double max_norm, Address grad_scale, Address found_inf, Address norm,
                 Address grad_norm, Address skipped, Address finished, Address stream) {
    const cuda::StepInputs inputs = checked_inputs(grad_factor, max_norm, grad_scale, found_inf, norm);
    const cuda::StepResults results = checked_results(grad_norm, skipped);
    const auto* rows = pointer<const double>(options, num_groups * cuda::kLionRow, "options");
    auto* count = pointer<uint32_t>(finished, 1, "finished");
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    step("lion_step", tensors, chunks, budget_bytes, on, [&](const cuda::OptimTable& table) {
      return cuda::launch_lion_step(table, rows, inputs, results, count, on);
    });
  }

 private:
  template <typename Launch>
  void step(const char* op, Address tensors, Address chunks, int64_t budget_bytes, cudaStream_t stream,
            const Launch& launch) {
    const auto* rows = pointer<const OptimTensor>(tensors, static_cast<int64_t>(table_.rows.size()), "tensors");
    const auto* work = pointer<const cuda::OptimChunk>(chunks, static_cast<int64_t>(table_.chunks.size()), "chunks");
    if (pinned_ != nullptr) {
      pinned_->use(buffers_);
    }
    const auto update = [&](int64_t chunk) { return launch(table_.of(chunk, rows, work)); };
    check_cuda(store_->walk(wanted_, budget_bytes, update, stream), op);
  }

  std::shared_ptr<PageStore> store_;
  PinnedStore* pinned_;
  cuda::PagedTable table_;
  std::vector<std::byte*> buffers_;
  std::vector<bool> wanted_;
};

template <cudaError_t (PageStore::*kCall)(cudaStream_t)>
void on_stream(PageStore& store, Address stream) {
  check_cuda((store.*kCall)(reinterpret_cast<cudaStream_t>(stream)), "paging");
}

}  // namespace

void bind_paging(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  const py::arg forms("forms");
  const py::arg page_bytes("page_bytes");
  const py::arg chunk_bytes("chunk_bytes");
  module.attr("managed_page_bytes") = cuda::kManagedPageBytes;
  module.attr("pinned_page_bytes") = cuda::kPinnedPageBytes;
  module.def("has_concurrent_managed_access", &cuda::has_concurrent_managed_access, py::arg("device"),
             "Whether managed memory of a device may move while kernels run; false if the driver does not say.");

  // Local to the module: the emulator's may be loaded beside it.
  py::class_<PageStore, std::shared_ptr<PageStore>>(module, "PageStore", py::buffer_protocol(), py::module_local(),
                                                    "An arena of states of which only some chunks are on the device.")
      .def_buffer(&buffer_of)
      .def_property_readonly("address",
                             [](const PageStore& store) { return reinterpret_cast<Address>(store.memory()); })
      .def_property_readonly("num_bytes", [](const PageStore& store) { return store.plan().num_bytes; })
      .def_property_readonly("places", &places_of,
                             "Offsets of (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax), -1 for none.")
      .def_property_readonly("largest_chunk", method(&PageStore::largest_chunk))
      .def_property_readonly("is_resident", method(&PageStore::is_resident))
      .def(
          "zero",
          [](PageStore& store, int64_t budget_bytes, Address stream) {
            check_cuda(store.zero(budget_bytes, reinterpret_cast<cudaStream_t>(stream)), "paging");
          },
          py::arg("budget_bytes"), py::arg("stream"), unlocked, "Sets every byte to 0, chunk by chunk.")
      .def("page_in", &on_stream<&PageStore::page_in>, py::arg("stream"), unlocked)
      .def("page_out", &on_stream<&PageStore::page_out>, py::arg("stream"), unlocked,
           "Returns when every chunk is gone from the device.")
      .def(
          "finish", [](PageStore& store) { check_cuda(store.finish(), "paging"); }, unlocked,
          "Returns when nothing moves: before the host reads.")
      .def("forget_residency", method(&PageStore::forget_residency),
           "Somebody else moved pages: asks for all of them anew.")
      .def_property_readonly(
          "statistics",
          [](const PageStore& store) {
            const cuda::PageStatistics held = store.statistics();
            return std::make_tuple(held.resident_bytes, held.bytes_in, held.bytes_out);
          },
          "Bytes on the device, moved there, and moved back, by what was asked for.");
  py::class_<ManagedStore, PageStore, std::shared_ptr<ManagedStore>>(module, "ManagedStore", py::module_local(),
                                                                     "In managed memory. What it holds is undefined.")
      .def(py::init(&make_store<ManagedStore>), forms, page_bytes, chunk_bytes,
           "forms holds (numel, moments, coded) of each tensor.")
      .def("renew", &on_stream<&PageStore::renew>, py::arg("stream"), unlocked,
           "Asks again for what is on the device by what was asked for: an allocation may have evicted some of it.");
  py::class_<PinnedStore, PageStore, std::shared_ptr<PinnedStore>>(module, "PinnedStore", py::module_local(),
                                                                   "In pinned host memory, with any bytes.")
      .def(py::init(&make_store<PinnedStore>), forms, page_bytes, chunk_bytes,
           "forms holds (numel, moments, coded) of each tensor.")
      .def_property_readonly("staging_bytes", method(&PinnedStore::staging_bytes));
  py::class_<StoreTable>(module, "StoreTable", py::module_local(), "What a step over a store is given.")
      .def(py::init<std::shared_ptr<PageStore>, std::vector<int64_t>, Address>(), py::arg("store"), py::arg("row_of"),
           py::arg("staging"),
           "row_of holds the row that updates each tensor of the store, or -1; staging is the address of "
           "staging_bytes on the device, for a PinnedStore.")
      .def_property_readonly("rows", method(&StoreTable::rows),
                             "(row, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax): whose other columns, and "
                             "addresses of states.")
      .def_property_readonly("chunks", method(&StoreTable::chunks), "(tensor, index) of each OptimChunk.")
      .def("adamw_step", method(&StoreTable::adamw_step), py::arg("tensors"), py::arg("chunks"),
           py::arg("budget_bytes"), py::arg("options"), py::arg("num_groups"), py::arg("decoupled"),
           py::arg("grad_factor"), py::arg("max_norm"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("norm"),
           py::arg("grad_norm"), py::arg("skipped"), py::arg("finished"), py::arg("stream"), unlocked,
           "As the function adamw_step, with no more than budget_bytes of the store on the device.")
      .def("lion_step", method(&StoreTable::lion_step), py::arg("tensors"), py::arg("chunks"), py::arg("budget_bytes"),
           py::arg("options"), py::arg("num_groups"), py::arg("grad_factor"), py::arg("max_norm"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("norm"), py::arg("grad_norm"), py::arg("skipped"),
           py::arg("finished"), py::arg("stream"), unlocked,
           "As the function lion_step, with no more than budget_bytes of the store on the device.");
}

}  // namespace qlora_native::python
