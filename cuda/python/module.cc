#include "cuda/python/all_bindings.h"

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Torch-free CUDA kernels of qlora_native on raw device addresses and a stream.";
  qlora_native::python::bind_all(module);
}
