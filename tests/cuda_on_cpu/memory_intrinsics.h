// Loads, stores, fences and atomics under CUDA's own names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/banks.h"
#include "cuda_on_cpu/race.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/visibility.h"

namespace cuemu {

// Alignment and bounds of an access whose width is known, and its place in the race check.
inline void check_access(const void* address, size_t num_bytes, size_t align, Access access, const char* verb,
                         Site site) {
  if (reinterpret_cast<uintptr_t>(address) % align != 0) {
    fail_misaligned(Where::site(site), "%s: the address lies %d bytes past a multiple of %d", verb,
                    static_cast<int>(reinterpret_cast<uintptr_t>(address) % align), static_cast<int>(align));
  }
  if (is_shared(address)) {
    note_bank(address, num_bytes, Where::site(site));
    note_shared(address, num_bytes, access, Where::site(site));
  } else {
    check_global(address, num_bytes, access, verb, Where::site(site));
  }
}

// Of functions that check what they access by themselves, so that the hooks do not check it again.
#define CUEMU_CHECKED __attribute__((no_sanitize("thread")))

template <typename T>
CUEMU_CHECKED T load_global(const T* address, const char* verb, Site site) {
  if (is_shared(address)) {
    fail(site, "%s of an address in shared memory", verb);
  }
  check_access(address, sizeof(T), sizeof(T), Access::kRead, verb, site);
  return *address;
}

template <typename T>
CUEMU_CHECKED void store_global(T* address, T value, const char* verb, Site site) {
  if (is_shared(address)) {
    fail(site, "%s of an address in shared memory", verb);
  }
  check_access(address, sizeof(T), sizeof(T), Access::kWrite, verb, site);
  *address = value;
}

// Gives the old value. Threads run one at a time, so plain accesses are atomic.
template <typename T, typename Change>
CUEMU_CHECKED T change_atomically(T* address, Change change, const char* verb, Site site) {
  check_access(address, sizeof(T), sizeof(T), Access::kAtomic, verb, site);
  T* const target = address;
  const T old = *target;
  const T changed = change(old);
  __builtin_memcpy(target, &changed, sizeof(T));
  return old;
}

}  // namespace cuemu

#define CUEMU_LOAD(name)                                             \
  template <typename T>                                              \
  T name(const T* address, cuemu::Site site = cuemu::Site::here()) { \
    return cuemu::load_global(address, #name, site);                 \
  }
CUEMU_LOAD(__ldg)
CUEMU_LOAD(__ldca)
CUEMU_LOAD(__ldcg)
CUEMU_LOAD(__ldcs)
CUEMU_LOAD(__ldcv)
CUEMU_LOAD(__ldlu)
#undef CUEMU_LOAD

#define CUEMU_STORE(name)                                                                        \
  template <typename T>                                                                          \
  void name(T* address, std::type_identity_t<T> value, cuemu::Site site = cuemu::Site::here()) { \
    cuemu::store_global(address, value, #name, site);                                            \
  }
CUEMU_STORE(__stcg)
CUEMU_STORE(__stcs)
CUEMU_STORE(__stwb)
CUEMU_STORE(__stwt)
#undef CUEMU_STORE

inline void __threadfence() { cuemu::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { cuemu::fence(); }

#define CUEMU_ATOMIC(name, expression)                                                                 \
  template <typename T>                                                                                \
  T name(T* address, std::type_identity_t<T> value, cuemu::Site site = cuemu::Site::here()) {          \
    return cuemu::change_atomically(                                                                   \
        address, [value]([[maybe_unused]] T old) { return static_cast<T>(expression); }, #name, site); \
  }
CUEMU_ATOMIC(atomicAdd, old + value)
CUEMU_ATOMIC(atomicAdd_block, old + value)
CUEMU_ATOMIC(atomicAdd_system, old + value)
CUEMU_ATOMIC(atomicSub, old - value)
CUEMU_ATOMIC(atomicMin, value < old ? value : old)
CUEMU_ATOMIC(atomicMax, value > old ? value : old)
CUEMU_ATOMIC(atomicAnd, old& value)
CUEMU_ATOMIC(atomicOr, old | value)
CUEMU_ATOMIC(atomicXor, old ^ value)
CUEMU_ATOMIC(atomicExch, value)
CUEMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUEMU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUEMU_ATOMIC

template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            cuemu::Site site = cuemu::Site::here()) {
  return cuemu::change_atomically(address, [=](T old) { return old == expected ? value : old; }, "atomicCAS", site);
}
