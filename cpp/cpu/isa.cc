#include "cpu/isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora_native::cpu {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return ((word >> index) & 1u) != 0; }

// XCR0, the register states that the operating system saves (Intel SDM vol. 1, 13.3).
uint64_t saved_states() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives a process its tile registers only when it asks (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_of_this_cpu() {
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || !bit(ecx, 27)) {  // OSXSAVE: xgetbv may be executed
    return Isa::kScalar;
  }
  const bool fma_f16c_avx = bit(ecx, 12) && bit(ecx, 29) && bit(ecx, 28);
  const uint64_t states = saved_states();
  constexpr uint64_t kYmm = 0x6;   // SSE and AVX state
  constexpr uint64_t kZmm = 0xe6;  // and opmask, upper halves, upper registers
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) {
    return Isa::kScalar;
  }
  const uint32_t max_subleaf = eax;
  if (!fma_f16c_avx || !bit(ebx, 5) || (states & kYmm) != kYmm) {
    return Isa::kScalar;
  }
  const bool avx512 = bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);  // F, DQ, BW, VL
  if (!avx512 || (states & kZmm) != kZmm) {
    return Isa::kAvx2;
  }
  const bool amx = bit(edx, 22) && bit(edx, 24);  // AMX-BF16, AMX-TILE
  if (max_subleaf < 1 || __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0 || !bit(eax, 5)) {
    return Isa::kAvx512;
  }
  constexpr uint64_t kTileState = 0x60000;
  return amx && (states & kTileState) == kTileState && may_use_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
}

#else

Isa best_of_this_cpu() { return Isa::kScalar; }

#endif

std::string joined(const std::vector<Isa>& isas) {
  std::string text;
  for (const Isa isa : isas) {
    text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return text;
}

Isa choose() {
  std::vector<Isa> usable = isas_built();
  const Isa best = best_of_this_cpu();
  std::erase_if(usable, [best](Isa isa) { return isa > best; });
  const char* wanted = std::getenv("QLORA_NATIVE_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return usable.back();
  }
  const auto found = std::find_if(usable.begin(), usable.end(),
                                  [wanted](Isa isa) { return std::string_view(isa_name(isa)) == wanted; });
  if (found == usable.end()) {
    throw std::invalid_argument("QLORA_NATIVE_ISA is '" + std::string(wanted) + "', but this machine and build offer " +
                                joined(usable) + ": set it to one of these or leave it unset.");
  }
  return *found;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> isas_built() {
  std::vector<Isa> isas{Isa::kScalar};
#if defined(__x86_64__)
  isas.insert(isas.end(), {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx});
#endif
  return isas;
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace qlora_native::cpu
