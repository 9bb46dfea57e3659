#include "cpu/isa/isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora_native::cpu {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16"};

// Kernels beyond AVX2 may have been compiled for AVX2, over an emulation (tests/avx512_on_avx2).
#if defined(QLORA_NATIVE_EMULATE_ISAS)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

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
  if (kEmulated) {
    return Isa::kAmx;
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

bool is_intel() {
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
  constexpr uint32_t kGenu = 0x756e6547;
  constexpr uint32_t kIneI = 0x49656e69;
  constexpr uint32_t kNtel = 0x6c65746e;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == kGenu && edx == kIneI && ecx == kNtel;
}

#elif defined(__aarch64__)

Isa best_of_this_cpu() {
#if defined(__linux__)
  constexpr unsigned long kAsimd = 1ul << 1;  // HWCAP_ASIMD
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  if ((getauxval(AT_HWCAP) & kAsimd) == 0) {
    return Isa::kScalar;
  }
  return (getauxval(AT_HWCAP2) & kBf16) != 0 ? Isa::kNeonBf16 : Isa::kNeon;
#elif defined(__APPLE__)
  int bf16 = 0;
  size_t size = sizeof bf16;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &bf16, &size, nullptr, 0) == 0 && bf16 != 0 ? Isa::kNeonBf16
                                                                                               : Isa::kNeon;
#else
  return Isa::kNeon;  // part of the architecture
#endif
}
bool is_intel() { return false; }

#else

Isa best_of_this_cpu() { return Isa::kScalar; }
bool is_intel() { return false; }

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
#elif defined(__aarch64__)
  isas.insert(isas.end(), {Isa::kNeon, Isa::kNeonBf16});
#endif
  return isas;
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

bool bf16_dot_is_slow() {
  static const bool slow = !kEmulated && is_intel();
  return slow;
}

}  // namespace qlora_native::cpu
