// A weight in device memory, as the functions of _cuda take it.
#pragma once

#include "cuda/python/errors.h"
#include "cuda/tables.h"
#include "python/bindings.h"

namespace qlora_native::python {

// On the current device; the built-in tables that 0 stands for are those in its memory.
inline WeightView checked_device_weight(const WeightFields& fields) {
  WeightView weight = checked_weight(fields);
  if (is_gguf(weight.type)) {  // which has no tables
    return weight;
  }
  const bool has_nested_code = std::get<5>(fields) != 0;
  const bool has_levels = std::get<6>(fields) != 0;
  if (weight.numel > 0 && !(has_nested_code && has_levels)) {
    const cuda::BuiltInTables* tables = nullptr;
    check_cuda(cuda::built_in_tables(tables), "built_in_tables");
    weight.nested_code = has_nested_code ? weight.nested_code : tables->nested_code.value;
    weight.levels = has_levels ? weight.levels : tables->levels[std::get<7>(fields)].value;
  }
  return weight;
}

}  // namespace qlora_native::python
