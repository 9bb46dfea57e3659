#include <pybind11/stl.h>

#include "python/bindings.h"

#if defined(__linux__)

#include <algorithm>
#include <memory>
#include <tuple>

#include "cpu/files/mapped_file.h"
#include "cpu/files/weight_stream.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using File = std::shared_ptr<cpu::MappedFile>;
using Parts = std::vector<std::tuple<File, int64_t, int64_t>>;  // file, begin, end

ByteRange checked_range(const cpu::MappedFile& file, int64_t begin, int64_t end) {
  require(0 <= begin && begin <= end && end <= file.num_bytes(), "bytes " + std::to_string(begin) + " to " +
                                                                     std::to_string(end) + " are none of the file's " +
                                                                     std::to_string(file.num_bytes()) + ".");
  return {begin, end};
}

cpu::Unit unit_of(const Parts& parts) {
  cpu::Unit unit;
  for (const auto& [file, begin, end] : parts) {
    require(file != nullptr, "the file of a part is None: expected a MappedFile.");
    unit.push_back({file, checked_range(*file, begin, end)});
  }
  return unit;
}

std::shared_ptr<cpu::WeightStream> weight_stream(const std::vector<Parts>& units, const Parts& resident,
                                                 const Parts& rows) {
  std::vector<cpu::Unit> checked;
  for (const Parts& parts : units) {
    checked.push_back(unit_of(parts));
  }
  return std::make_shared<cpu::WeightStream>(std::move(checked), unit_of(resident), unit_of(rows));
}

bool want(cpu::WeightStream& stream, std::vector<int64_t> units, int64_t now, bool begins_pass) {
  const int64_t count = stream.num_units();
  for (const int64_t unit : units) {
    if (unit < 0 || unit >= count) {
      require(false, "unit " + std::to_string(unit) + " is none of the stream's " + std::to_string(count) + ".");
    }
  }
  if (now != -1 && std::find(units.begin(), units.end(), now) == units.end()) {
    require(false, "now is " + std::to_string(now) + ": expected -1, or one of the " + std::to_string(units.size()) +
                       " units.");
  }
  const py::gil_scoped_release unlocked;
  return stream.want(std::move(units), now, begins_pass);
}

}  // namespace

void bind_mapped_file(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::register_local_exception<cpu::MappedFileError>(module, "MappedFileError", PyExc_OSError);

  py::class_<cpu::MappedFile, File>(module, "MappedFile", py::buffer_protocol(),
                                    "A file in memory, copied on writing; cpu/files/mapped_file.h.")
      .def(py::init(
               [](const std::string& path) { return std::make_shared<cpu::MappedFile>(checked_path(path, "path")); }),
           py::arg("path"))
      .def_buffer([](const cpu::MappedFile& file) -> py::buffer_info {
        return {file.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {file.num_bytes()}, {1}};
      })
      .def_property_readonly("address",
                             [](const cpu::MappedFile& file) { return reinterpret_cast<uintptr_t>(file.data()); })
      .def_property_readonly("path", method(&cpu::MappedFile::path))
      .def_property_readonly("num_bytes", method(&cpu::MappedFile::num_bytes))
      .def("change", method(&cpu::MappedFile::change),
           "A sentence if the file changed since it was opened, else empty.")
      .def(
          "release",
          [](const cpu::MappedFile& file, int64_t begin, int64_t end) {
            file.release(checked_range(file, begin, end));
          },
          py::arg("begin"), py::arg("end"))
      .def(
          "resident_bytes",
          [](const cpu::MappedFile& file, int64_t begin, int64_t end) {
            return file.resident_bytes(checked_range(file, begin, end));
          },
          py::arg("begin"), py::arg("end"));

  py::class_<cpu::WeightStream, std::shared_ptr<cpu::WeightStream>>(
      module, "WeightStream",
      "Reads and gives up parts of mapped files beside the computing; cpu/files/weight_stream.h.")
      .def(py::init(&weight_stream), py::arg("units"), py::arg("resident"), py::arg("rows"))
      .def("want", &want, py::arg("units"), py::arg("now"), py::arg("begins_pass"))
      .def("settle", method(&cpu::WeightStream::settle), unlocked)
      .def_property_readonly("bytes_read", method(&cpu::WeightStream::bytes_read))
      .def_property_readonly("stalls", method(&cpu::WeightStream::stalls))
      .def_property_readonly("stall_seconds", method(&cpu::WeightStream::stall_seconds))
      .def_property_readonly("held", method(&cpu::WeightStream::held));
}

}  // namespace qlora_native::python

#else

namespace qlora_native::python {
void bind_mapped_file(pybind11::module_&) {}  // weights are copied into memory there
}  // namespace qlora_native::python

#endif
