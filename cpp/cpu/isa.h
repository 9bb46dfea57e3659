// Which instruction set the CPU kernels run on.
#pragma once

#include <string>
#include <vector>

namespace qlora_native::cpu {

// In rising order: each level includes the ones before it.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

inline constexpr int kNumIsas = 5;

const char* isa_name(Isa isa);

// Compiled into this library, whatever the machine.
std::vector<Isa> isas_built();

// The instruction set in use: QLORA_NATIVE_ISA if it is set, else the best one that is both built and usable here.
// Usable means that the CPU has it (cpuid) and the operating system saves its registers (xgetbv).
// Throws std::invalid_argument if the variable names an unknown or unusable set. Decided once, at the first call.
Isa current_isa();

}  // namespace qlora_native::cpu
