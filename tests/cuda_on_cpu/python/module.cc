// The bindings of _cuda with the emulator in the place of a device, and what a test asks the emulator.
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cuda/python/all_bindings.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/schedule.h"
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
}
