// A quantized weight as raw pointers: what every kernel that reads one is given. Of a GGUF type only `packed` is set.
#pragma once

#include <cstdint>

#include "core/arithmetic.h"

namespace qlora_native {

struct WeightView {
  const uint8_t* packed;        // [ceil(numel / 2)], or the blocks of a GGUF type
  const float* absmax;          // [blocks], null when double-quantized
  const uint8_t* absmax_codes;  // [blocks], null unless double-quantized
  const float* nested_absmax;   // [ceil(blocks / 256)]
  const float* nested_offset;   // [1]
  const float* nested_code;     // [256]
  const float* levels;          // [16]
  int64_t numel;
  int64_t block_size;  // a power of two
  QuantType type = QuantType::kNf4;

  QLORA_NATIVE_HD float scale(int64_t block) const {
    if (absmax != nullptr) {
      return absmax[block];
    }
    return decode_scale(nested_code[absmax_codes[block]], nested_absmax[block / 256], *nested_offset);
  }

  QLORA_NATIVE_HD int code(int64_t element) const {
    const int byte = packed[element / 2];
    return element % 2 == 0 ? byte >> 4 : byte & 15;
  }
};

}  // namespace qlora_native
