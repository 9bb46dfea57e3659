// arm64's floating-point control register.
#pragma once

#include <cstdint>

namespace qlora_native::cpu {

inline constexpr uint64_t kFlushBits = 0x1080000;  // FZ, and FZ16 for half precision

#if defined(__clang__)
inline uint64_t read_fpcr() { return __builtin_arm_rsr64("fpcr"); }
inline void write_fpcr(uint64_t value) { __builtin_arm_wsr64("fpcr", value); }
#else
inline uint64_t read_fpcr() { return __builtin_aarch64_get_fpcr64(); }
inline void write_fpcr(uint64_t value) { __builtin_aarch64_set_fpcr64(value); }
#endif

}  // namespace qlora_native::cpu
