// Which instruction set the CPU kernels run on.
#pragma once

#include <string>
#include <vector>

namespace qlora_native::cpu {

// In rising order: on the machines that have it, each level includes the ones before it.
enum class Isa : int {
  kScalar = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Bf16 = 3,
  kAmx = 4,
  kNeon = 5,
  kNeonBf16 = 6,
};

inline constexpr int kNumIsas = 7;

const char* isa_name(Isa isa);

// Compiled into this library, whatever the machine.
std::vector<Isa> isas_built();

// The instruction set in use: QLORA_NATIVE_ISA if it is set, else the best one that is both built and usable here.
// Usable means that the CPU has it (cpuid; on arm64 Linux's hwcaps, macOS's sysctl) and the operating system saves its
// registers (xgetbv). Throws std::invalid_argument if the variable names an unknown or unusable set. Decided once, at
// the first call.
Isa current_isa();

// Whether fp32 multiply-adds take bf16 operands through a product faster than vdpbf16ps does. A dot product makes two
// products a lane, but Intel's cores start one 512-bit vdpbf16ps every second cycle (measured on one with AMX: 121
// GFLOP/s a core against 240 of vfmadd), and two fused multiply-adds every cycle; AMD's Zen 4 starts as many of either.
bool bf16_dot_is_slow();

}  // namespace qlora_native::cpu
