// ldmatrix and mma.sync, with the fragment layouts of the PTX ISA manual (sections 9.7.14.5.7, .8 and .15).
#pragma once

#include <cstdint>

#include "core/half.h"
#include "cuda_on_cpu/site.h"

namespace cuemu {

enum class Trans : bool { kNo, kYes };

void load_matrices(uint32_t* registers,  // [4] of every lane
                   const void* row, Trans trans, Site site);

// d += a b in fp32, one product after the other in the order of k. k16: a has 4 registers and b 2; else 2 and 1.
void multiply(float* d, const uint32_t* a, const uint32_t* b, qlora_native::Dtype dtype, bool k16, Site site);

}  // namespace cuemu
