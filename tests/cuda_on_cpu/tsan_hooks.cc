// What a compiler calls before every load and store of a file built with -fsanitize=thread. The program is linked
// without that sanitizer's runtime: these functions take its place and hand every access to the checks.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/banks.h"
#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/race.h"

using cuemu::Access;

namespace {

void note(const void* address, size_t num_bytes, Access access, cuemu::Where where) {
  if (cuemu::self == nullptr || cuemu::in_check) {
    return;
  }
  cuemu::in_check = true;
  if (cuemu::is_shared(address)) {
    cuemu::note_bank(address, num_bytes, where);
    cuemu::note_shared(address, num_bytes, access, where);
  } else {
    cuemu::check_global(address, num_bytes, access, access == Access::kRead ? "read" : "write", where);
  }
  cuemu::in_check = false;
}

}  // namespace

#define CUEMU_HERE cuemu::Where::instruction(__builtin_return_address(0))

#define CUEMU_HOOKS(size)                                                                                      \
  void __tsan_read##size(void* address) { note(address, size, Access::kRead, CUEMU_HERE); }                    \
  void __tsan_write##size(void* address) { note(address, size, Access::kWrite, CUEMU_HERE); }                  \
  void __tsan_unaligned_read##size(void* address) { note(address, size, Access::kRead, CUEMU_HERE); }          \
  void __tsan_unaligned_write##size(void* address) { note(address, size, Access::kWrite, CUEMU_HERE); }        \
  void __tsan_volatile_read##size(void* address) { note(address, size, Access::kRead, CUEMU_HERE); }           \
  void __tsan_volatile_write##size(void* address) { note(address, size, Access::kWrite, CUEMU_HERE); }         \
  void __tsan_unaligned_volatile_read##size(void* address) { note(address, size, Access::kRead, CUEMU_HERE); } \
  void __tsan_unaligned_volatile_write##size(void* address) { note(address, size, Access::kWrite, CUEMU_HERE); }

// Atomics of host code in the same files (guards of static variables, reference counts): carried out, not checked.
#define CUEMU_ATOMICS(bits)                                                                                     \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* address, int) {                      \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* address, uint##bits##_t value, int) {               \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                             \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* address, uint##bits##_t value, int) {  \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                               \
  }                                                                                                             \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* address, uint##bits##_t value, int) { \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                             \
  uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* address, uint##bits##_t value, int) { \
    return __atomic_fetch_sub(address, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* address, uint##bits##_t* expected, \
                                                    uint##bits##_t value, int, int) {                           \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
  }

extern "C" {

CUEMU_ATOMICS(8)
CUEMU_ATOMICS(32)
CUEMU_ATOMICS(64)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

CUEMU_HOOKS(1)
CUEMU_HOOKS(2)
CUEMU_HOOKS(4)
CUEMU_HOOKS(8)
CUEMU_HOOKS(16)

void __tsan_read_range(void* address, size_t num_bytes) { note(address, num_bytes, Access::kRead, CUEMU_HERE); }
void __tsan_write_range(void* address, size_t num_bytes) { note(address, num_bytes, Access::kWrite, CUEMU_HERE); }

// clang's names for library calls in instrumented code.
void* __tsan_memcpy(void* to, const void* from, size_t num_bytes) {
  note(from, num_bytes, Access::kRead, CUEMU_HERE);
  note(to, num_bytes, Access::kWrite, CUEMU_HERE);
  return std::memcpy(to, from, num_bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t num_bytes) {
  note(from, num_bytes, Access::kRead, CUEMU_HERE);
  note(to, num_bytes, Access::kWrite, CUEMU_HERE);
  return std::memmove(to, from, num_bytes);
}
void* __tsan_memset(void* to, int value, size_t num_bytes) {
  note(to, num_bytes, Access::kWrite, CUEMU_HERE);
  return std::memset(to, value, num_bytes);
}

}  // extern "C"
