// Decode a quantized weight, or a rectangle of it, to fp32, bf16 or fp16. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/weight_view.h"

namespace qlora_native::cpu {

// Rows [row_begin, row_end) and columns [column_begin, column_end) of a weight seen as [rows, row_length].
struct Panel {
  int64_t row_length;
  int64_t row_begin;
  int64_t row_end;
  int64_t column_begin;
  int64_t column_end;
};

void dequantize_4bit(const WeightView& weight, const Panel& panel, Dtype dtype,
                     void* out);  // [row_end - row_begin, column_end - column_begin]

// Undoes double quantization.
void decode_scales(const WeightView& weight, int64_t blocks,
                   float* scales);  // [blocks]

}  // namespace qlora_native::cpu
