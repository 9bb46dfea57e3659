// For each block, the scale of the least weighted squared error among those that its format can store. Pointers are
// trusted: the bindings check.
#pragma once

#include "core/half.h"
#include "cpu/kernels/calibration.h"

namespace qlora_native::cpu {

// Fills job.packed and job.chosen; every other field is given, job.x of `dtype`. The bytes depend on neither the
// number of threads nor the instruction set.
void search_scales_4bit(const SearchJob& job, Dtype dtype);

}  // namespace qlora_native::cpu
