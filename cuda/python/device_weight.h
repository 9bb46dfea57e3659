// A weight in device memory, as the functions of _cuda take it.
#pragma once

#include "python/bindings.h"

namespace qlora_native::python {

// The built-in tables that 0 stands for lie in host memory, so here both have to be given.
inline WeightView checked_device_weight(const WeightFields& fields) {
  const Address absmax_codes = std::get<2>(fields);
  const Address nested_code = std::get<5>(fields);
  const Address levels = std::get<6>(fields);
  require(levels != 0, "levels is a null pointer: expected the address of 16 floats in device memory.");
  require(absmax_codes == 0 || nested_code != 0,
          "nested_code is a null pointer: expected the address of 256 floats in device memory.");
  return checked_weight(fields);
}

}  // namespace qlora_native::python
