// The built-in tables in a device's memory: levels of both quantization types and the code of nested scales. They are
// part of the kernels' image, so that no allocator, stream or graph has a share in them.
#pragma once

#include <cuda_runtime_api.h>

#include "core/codebook.h"
#include "core/nested_code.h"

namespace qlora_native::cuda {

struct BuiltInTables {
  Levels levels[2];  // by QuantType
  NestedCode nested_code;
};

// Their address on the current device.
cudaError_t built_in_tables(const BuiltInTables*& tables);

}  // namespace qlora_native::cuda
