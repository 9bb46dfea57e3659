// Decode a quantized weight, or a rectangle of it, to fp32, bf16 or fp16. Pointers are trusted: the bindings check.
#pragma once

#include "core/half.h"
#include "core/panel.h"
#include "core/weight_view.h"

namespace qlora_native::cpu {

void dequantize_4bit(const WeightView& weight, const Panel& panel, Dtype dtype,
                     void* out);  // [row_end - row_begin, column_end - column_begin]

// Undoes double quantization.
void decode_scales(const WeightView& weight, int64_t blocks,
                   float* scales);  // [blocks]

}  // namespace qlora_native::cpu
