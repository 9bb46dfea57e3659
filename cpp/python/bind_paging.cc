#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "cpu/files/file_store.h"
#include "cpu/files/paging.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

constexpr int64_t kMostPage = int64_t{1} << 40;

using Forms = std::vector<std::tuple<int64_t, int, bool>>;

PagePlan page_plan(const Forms& forms, int64_t page_bytes, int64_t chunk_bytes, int64_t block_bytes) {
  std::vector<StateForm> checked;
  int64_t total = 0;
  require(checked_size(page_bytes, "page_bytes") <= kMostPage && checked_size(block_bytes, "block_bytes") <= kMostPage,
          "page_bytes or block_bytes is over 2^40.");
  for (const auto& [numel, moments, coded] : forms) {
    total = checked_size(total + checked_size(numel, "numel"), "the number of elements of all forms");
    require(moments == 1 || moments == 2, "moments is " + std::to_string(moments) + ": expected 1 or 2.");
    checked.push_back({numel, moments, coded});
  }
  return plan_pages(checked, page_bytes, chunk_bytes, block_bytes);
}

std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> places_of(const PagePlan& plan) {
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> places;
  for (const StatePlace& place : plan.places) {
    places.emplace_back(place.exp_avg, place.exp_avg_sq, place.exp_avg_absmax, place.exp_avg_sq_absmax);
  }
  return places;
}

py::buffer_info buffer_of(const cpu::FileStore& store) {
  return {store.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {store.num_bytes()}, {1}};
}

void add(cpu::Pager& pager, const std::shared_ptr<cpu::FileStore>& store, const PagePlan& plan) {
  require(store != nullptr, "the store is None: expected a FileStore.");
  require(store->num_bytes() >= plan.num_bytes, "the store has " + std::to_string(store->num_bytes()) +
                                                    " bytes: expected at least the plan's " +
                                                    std::to_string(plan.num_bytes) + ".");
  require(plan.page_bytes % cpu::page_bytes() == 0, "the plan's pages are " + std::to_string(plan.page_bytes) +
                                                        " bytes: expected a multiple of this machine's " +
                                                        std::to_string(cpu::page_bytes()) + ".");
  pager.add(store, plan);
}

}  // namespace

void bind_paging(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::register_local_exception<cpu::PageFileError>(module, "PageFileError", PyExc_OSError);
  module.attr("page_bytes") = cpu::page_bytes();
  module.attr("block_bytes") = std::max(cpu::kBlockBytes, cpu::page_bytes());
  module.def(
      "lies_in_memory", [](const std::string& folder) { return cpu::lies_in_memory(checked_path(folder, "folder")); },
      py::arg("folder"), "Whether a folder is one of a tmpfs.");

  py::class_<PagePlan>(module, "PagePlan", "Where states lie in an arena, and its chunks; core/page_plan.h.")
      .def(py::init(&page_plan), py::arg("forms"), py::arg("page_bytes"), py::arg("chunk_bytes"),
           py::arg("block_bytes"), "forms holds (numel, moments, coded) of each tensor.")
      .def_readonly("num_bytes", &PagePlan::num_bytes)
      .def_property_readonly("places", &places_of,
                             "Offsets of (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax), -1 for none.")
      .def_property_readonly("largest_chunk", [](const PagePlan& plan) {
        int64_t largest = 0;
        for (const PageChunk& chunk : plan.chunks) {
          largest = std::max(largest, chunk.num_bytes);
        }
        return largest;
      });

  py::class_<cpu::FileStore, std::shared_ptr<cpu::FileStore>>(module, "FileStore", py::buffer_protocol(),
                                                              "Bytes in private memory or in a file without a name.")
      .def(
          py::init([](int64_t num_bytes, const std::string& folder, bool in_file) {
            const py::gil_scoped_release unlocked_here;  // a guard of the whole call would hold while pybind11 lists it
            return std::make_shared<cpu::FileStore>(checked_size(num_bytes, "num_bytes"),
                                                    checked_path(folder, "folder"), in_file);
          }),
          py::arg("num_bytes"), py::arg("folder"), py::arg("in_file"))
      .def_buffer(&buffer_of)
      .def_property_readonly("num_bytes", method(&cpu::FileStore::num_bytes))
      .def_property_readonly("bytes_in_file", method(&cpu::FileStore::bytes_in_file))
      .def_property_readonly("bytes_in", method(&cpu::FileStore::bytes_in))
      .def_property_readonly("bytes_out", method(&cpu::FileStore::bytes_out))
      .def("resident_bytes", [](const cpu::FileStore& store) { return store.resident_bytes(); }, unlocked);

  py::class_<cpu::Pager>(module, "Pager", "Moves the chunks of stores in and out around an optimizer's step.")
      .def(py::init<>())
      .def("add", &add, py::arg("store"), py::arg("plan"))
      .def("to_file", method(&cpu::Pager::to_file), unlocked)
      .def("to_memory", method(&cpu::Pager::to_memory), unlocked)
      .def("evict", method(&cpu::Pager::evict), unlocked)
      .def_property_readonly("look_ahead", method(&cpu::Pager::look_ahead))
      .def_property_readonly("stalls", method(&cpu::Pager::stalls))
      .def_property_readonly("stall_seconds", method(&cpu::Pager::stall_seconds));
}

}  // namespace qlora_native::python
