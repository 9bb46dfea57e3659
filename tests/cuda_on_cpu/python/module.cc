// The bindings of _cuda with the emulator in the place of a device, and what a test asks the emulator.
#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/python/all_bindings.h"
#include "cuda/python/errors.h"
#include "cuda_on_cpu/address_space.h"
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
using qlora_native::python::check_cuda;
using qlora_native::python::require;

Address new_stream() {
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream could be made.");
  return reinterpret_cast<Address>(stream);
}

Address new_event() {
  cudaEvent_t event = nullptr;
  require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess, "no event could be made.");
  return reinterpret_cast<Address>(event);
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

// As what kernels may access: "device", "host" (not at all) or "freed" memory.
void add_range(Address address, size_t num_bytes, const std::string& kind) {
  require(kind == "device" || kind == "host" || kind == "freed", "kind is device, host or freed.");
  cuemu::add_range(reinterpret_cast<const void*>(address), num_bytes,
                   kind == "device" ? cuemu::Kind::kDevice
                   : kind == "host" ? cuemu::Kind::kHost
                                    : cuemu::Kind::kFreed);
}

void forget_range(Address address) { cuemu::forget_range(reinterpret_cast<const void*>(address)); }

cudaStream_t stream_at(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void begin_capture(Address stream, bool relaxed) {
  check_cuda(
      cudaStreamBeginCapture(stream_at(stream), relaxed ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal),
      "begin_capture");
}

Address end_capture(Address stream) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamEndCapture(stream_at(stream), &graph), "end_capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "end_capture");
  cudaGraphDestroy(graph);
  return reinterpret_cast<Address>(executable);
}

void launch_graph(Address graph, Address stream) {
  check_cuda(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(graph), stream_at(stream)), "launch_graph");
}

void destroy_graph(Address graph) { cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(graph)); }

void call_on_stream(Address stream, std::function<void()> function) {
  check_cuda(cuemu::submit(stream_at(stream),
                           [function = std::move(function)] {
                             function();
                             return cudaSuccess;
                           }),
             "call_on_stream");
}

void synchronize(Address stream) { check_cuda(cudaStreamSynchronize(stream_at(stream)), "synchronize"); }

void record_event(Address event, Address stream) {
  check_cuda(cudaEventRecord(reinterpret_cast<cudaEvent_t>(event), stream_at(stream)), "record_event");
}

void wait_event(Address stream, Address event) {
  check_cuda(cudaStreamWaitEvent(stream_at(stream), reinterpret_cast<cudaEvent_t>(event), 0), "wait_event");
}

void run_streams(bool is_late, uint64_t seed) { cuemu::set_stream_order({is_late, seed}); }

}  // namespace

PYBIND11_MODULE(CUEMU_MODULE, module) {
  module.doc() = "The kernels of _cuda, executed by the emulator.";
  qlora_native::python::bind_all(module);
  cuemu::print_reports(false);
  cuemu::set_strict(false);  // torch's memory is not registered unless a test does it
  module.attr("num_schedules") = cuemu::all_schedules().size();
  module.def("play", &play, py::arg("sm"), py::arg("num_sms"), py::arg("schedule"),
             "Which architecture the emulator plays, and in which order threads run.");
  module.def("new_stream", &new_stream, "A stream other than the default one.");
  module.def("new_event", &new_event, "An event that nothing has recorded.");
  module.def("record_event", &record_event, py::arg("event"), py::arg("stream"), "After what the stream holds.");
  module.def("wait_event", &wait_event, py::arg("stream"), py::arg("event"),
             "What follows in the stream waits for it.");
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
  module.def("set_strict", &cuemu::set_strict, py::arg("strict"),
             "Whether an access of memory that is neither allocated here nor registered is reported.");
  module.def("add_range", &add_range, py::arg("address"), py::arg("num_bytes"), py::arg("kind"),
             "Registers memory that others allocated; cuda_on_cpu/address_space.h.");
  module.def("forget_range", &forget_range, py::arg("address"), "Takes that back.");
  module.def("begin_capture", &begin_capture, py::arg("stream"), py::arg("relaxed") = false,
             "From now on work of the stream goes into a graph.");
  module.def("end_capture", &end_capture, py::arg("stream"), "The graph, ready to be launched.");
  module.def("launch_graph", &launch_graph, py::arg("graph"), py::arg("stream"), "Runs what was captured.");
  module.def("destroy_graph", &destroy_graph, py::arg("graph"), "Frees it.");
  module.def("call_on_stream", &call_on_stream, py::arg("stream"), py::arg("function"),
             "Calls the function in the stream's order, or with the graph that the stream is being captured into.");
  module.def("synchronize", &synchronize, py::arg("stream"), "Waits for the stream.");
  module.def("num_queued", [] { return cuemu::num_queued(); }, "Pieces of work that have not run.");
}
