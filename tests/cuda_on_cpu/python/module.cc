// The bindings of _cuda with the emulator in the place of a device, and what a test asks the emulator.
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cuda/python/all_bindings.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/schedule.h"
#include "cuda_on_cpu/streams.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace {

using qlora_native::python::Address;
using qlora_native::python::require;

Address new_stream() {
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream could be made.");
  return reinterpret_cast<Address>(stream);
}

std::vector<std::pair<int64_t, Address>> take_launches() {
  std::vector<std::pair<int64_t, Address>> found;
  for (const cuemu::Launch& launch : cuemu::take_launches()) {
    const auto blocks = static_cast<int64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
    found.emplace_back(blocks, reinterpret_cast<Address>(launch.stream));
  }
  return found;
}

void play(int sm, int num_sms, size_t schedule) {
  cuemu::device() = cuemu::device_of(sm);
  cuemu::device().num_sms = num_sms;
  cuemu::set_schedule(cuemu::all_schedules().at(schedule));
}

void set_memory(size_t total_bytes, bool concurrent_managed_access) {
  cuemu::device().total_bytes = total_bytes;
  cuemu::device().concurrent_managed_access = concurrent_managed_access;
}

std::pair<size_t, size_t> memory() {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  require(cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess, "the device does not say what is free.");
  return {free_bytes, total_bytes};
}

Address allocate(size_t num_bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, num_bytes) == cudaSuccess, "the device's memory is full.");
  return reinterpret_cast<Address>(memory);
}

void release(Address address) { require(cudaFree(reinterpret_cast<void*>(address)) == cudaSuccess, "no such memory."); }

py::dict take_managed_counters() {
  const cuemu::ManagedCounters counters = cuemu::take_managed_counters();
  return py::dict(py::arg("device_faults") = counters.device_faults,
                  py::arg("remote_accesses") = counters.remote_accesses, py::arg("host_faults") = counters.host_faults,
                  py::arg("to_device") = counters.to_device, py::arg("to_host") = counters.to_host,
                  py::arg("evicted") = counters.evicted, py::arg("idle_prefetches") = counters.idle_prefetches,
                  py::arg("most_to_device") = counters.most_to_device, py::arg("most_to_host") = counters.most_to_host);
}

void run_streams(bool is_late, uint64_t seed) { cuemu::set_stream_order({is_late, seed}); }

}  // namespace

PYBIND11_MODULE(_cuda_emulated, module) {
  module.doc() = "The kernels of _cuda, executed by the emulator.";
  qlora_native::python::bind_all(module);
  cuemu::print_reports(false);
  module.attr("num_schedules") = cuemu::all_schedules().size();
  module.def("play", &play, py::arg("sm"), py::arg("num_sms"), py::arg("schedule"),
             "Which architecture the emulator plays, and in which order threads run.");
  module.def("new_stream", &new_stream, "A stream other than the default one.");
  module.def("take_launches", &take_launches, "Blocks and stream of each launch since the last call.");
  module.def("take_reports", &cuemu::take_reports, "What the emulator found wrong since the last call, in words.");
  module.def("set_memory", &set_memory, py::arg("total_bytes"), py::arg("concurrent_managed_access"),
             "How much memory the device has, and whether managed memory moves while kernels run.");
  module.def("memory", &memory, "Bytes of the device that are free, and all of them.");
  module.def("allocate", &allocate, py::arg("num_bytes"), "Plain memory of the device.");
  module.def("release", &release, py::arg("address"), "Gives it back.");
  module.def("take_managed_counters", &take_managed_counters,
             "What moved pages of managed memory since the last call; cuda_on_cpu/managed.h.");
  module.def("run_streams", &run_streams, py::arg("is_late"), py::arg("seed"),
             "What is queued runs; from then on work runs at once, or late in an order drawn from the seed.");
  module.def("num_queued", [] { return cuemu::num_queued(); }, "Pieces of work that have not run.");
}
