// Quantize to 4 bits, with or without double quantization. Pointers are trusted: the bindings check.
#pragma once

#include <cstdint>

#include "core/codebook.h"
#include "core/half.h"

namespace qlora_native::cpu {

// Returns the index of a non-finite element (the lowest), or -1 when all are finite and the outputs are complete.
int64_t quantize_4bit(const void* x,  // [numel]
                      Dtype dtype, int64_t numel, int64_t block_size, QuantType type,
                      uint8_t* packed,  // [ceil(numel / 2)]
                      float* absmax);   // [blocks]

// Double quantization: scales to 8 bits around their mean, in blocks of 256. The mean is a sum in a fixed order in
// double precision, so that neither threads nor devices can change it.
void quantize_scales(const float* absmax,  // [blocks]
                     int64_t blocks,
                     uint8_t* codes,         // [blocks]
                     float* nested_absmax,   // [ceil(blocks / 256)]
                     float* nested_offset);  // [1]

}  // namespace qlora_native::cpu
