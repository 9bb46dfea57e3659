// Everything that the module _cuda offers, for it and for a module that runs the kernels elsewhere.
#pragma once

#include <pybind11/pybind11.h>

namespace qlora_native::python {

void bind_all(pybind11::module_& module);

}  // namespace qlora_native::python
