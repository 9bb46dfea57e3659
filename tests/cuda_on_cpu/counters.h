// How often kernels did what costs time, so that tests can hold bank conflicts and copies to a number.
#pragma once

#include <cstdint>

namespace cuemu {

struct Counters {
  uint64_t mma;                  // m16n8k16, or two m16n8k8, of a warp
  uint64_t ldmatrix;             // matrices of 8 rows
  uint64_t ldmatrix_wavefronts;  // passes over the banks that they took; without conflicts one a matrix
  uint64_t async_copies;         // of 16 bytes
  uint64_t barriers;             // of a block
  uint64_t warp_meetings;        // shuffles, votes, __syncwarp
};

// Counts since the last reset, over all launches: counters() = {}.
inline Counters& counters() {
  static Counters all{};
  return all;
}

// Bytes of device memory that kernels read and wrote while `counts` is set, however small or cached the access. Counted
// by the build with the race check alone, whose hooks see every load and store.
struct GlobalBytes {
  bool counts;
  uint64_t read;
  uint64_t written;
};

inline GlobalBytes& global_bytes() {
  static GlobalBytes bytes{};
  return bytes;
}

}  // namespace cuemu
