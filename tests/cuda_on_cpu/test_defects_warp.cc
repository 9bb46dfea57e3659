// Small kernels around shared memory and the warp: sums of a block, a transpose, a table, votes; sound and with one
// defect at a time. Their shared memory is read and written by plain loads and stores.
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/defects.h"

using namespace qlora_native;

namespace {

enum class Flaw {
  kNone,
  kNoBarrierBeforeSums,
  kNoBarrierBeforeReuse,
  kArrayOneShort,
  kShuffleInBranch,
  kShuffleFromOutside,
  kShuffleMaskWithoutCaller,
  kVoteAfterReturn,
  kEarlyReturn,
  kPlainReadOfAtomic,
  kMisalignedVector,
  kUnwrittenShared,
  kUnguardedRead,
  kReadBeforeBegin,
  kNoSyncwarp,
  kNoSecondSyncwarp,
  kSyncwarpInBranch,
};

constexpr int kBlock = 128;
constexpr int kRounds = 2;

// Each block's sums of two rows of 128.
template <Flaw kFlaw>
__global__ void sums(const float* x,  // [kRounds, count]
                     int count,
                     float* out) {  // [kRounds, gridDim.x]
  constexpr int kWarps = kBlock / 32;
  WP_SHARED(float, partial, kFlaw == Flaw::kArrayOneShort ? kWarps - 1 : kWarps);
  WP_SHARED(int, arrived, 1);
  const int thread = threadIdx.x;
  const int element = blockIdx.x * kBlock + thread;
  if (kFlaw == Flaw::kEarlyReturn && element >= count) {
    return;
  }
  if (thread == 0) {
    arrived[0] = 0;
  }
  __syncthreads();
  if (kFlaw == Flaw::kVoteAfterReturn && thread == 3) {
    return;
  }
  atomicAdd(arrived, 1);
  if (kFlaw == Flaw::kPlainReadOfAtomic && thread == 127 && arrived[0] > kBlock) {
    return;
  }
  for (int round = 0; round < kRounds; ++round) {
    const bool inside = element < count || kFlaw == Flaw::kUnguardedRead;
    float sum = inside ? x[round * count + element] : 0.0f;
    if (kFlaw == Flaw::kUnguardedRead && element >= count) {
      sum = sum == -1e30f ? 1.0f : 0.0f;  // what was read does no harm
    }
    if (kFlaw == Flaw::kReadBeforeBegin && x[element - 1] == -1e30f) {
      sum = 1.0f;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      if (kFlaw == Flaw::kShuffleInBranch) {
        if (thread % 32 < 2 * offset) {
          sum += __shfl_down_sync(0xffffffffu, sum, offset);
        }
      } else if (kFlaw == Flaw::kShuffleFromOutside) {
        sum += thread % 32 < 16 ? __shfl_sync(0x0000ffffu, sum, thread % 32 + offset) : 0.0f;
      } else if (kFlaw == Flaw::kShuffleMaskWithoutCaller) {
        sum += __shfl_xor_sync(0x7fffffffu, sum, offset);
      } else {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      }
    }
    if (thread % 32 == 0 && (kFlaw != Flaw::kUnwrittenShared || thread != 64)) {
      partial[thread / 32] = sum;
    }
    if (kFlaw != Flaw::kNoBarrierBeforeSums) {
      __syncthreads();
    }
    if (thread == 0) {
      float total = 0.0f;
      for (unsigned i = 0; i < blockDim.x / 32; ++i) {
        total += partial[i];
      }
      out[round * gridDim.x + blockIdx.x] = total;
    }
    if (kFlaw != Flaw::kNoBarrierBeforeReuse) {
      __syncthreads();
    }
  }
  if (__ballot_sync(0xffffffffu, arrived[0] == kBlock) != 0xffffffffu) {
    out[blockIdx.x] = -1.0f;
  }
}

template <Flaw kFlaw>
bool run_sums() {
  constexpr int kCount = 200;
  std::vector<float> x(kRounds * kCount);
  std::iota(x.begin(), x.end(), 1.0f);
  const cuemu::DeviceBuffer<float> device_x(x);
  const cuemu::DeviceBuffer<float> out(kRounds * 2);
  const cudaError_t error =
      wp::launch(sums<kFlaw>, dim3(2), dim3(kBlock), 0, nullptr, device_x.data(), kCount, out.data());
  std::vector<float> expected(kRounds * 2);
  for (int i = 0; i < kRounds * kCount; ++i) {
    expected[static_cast<size_t>(i / kCount * 2 + i % kCount / kBlock)] += x[static_cast<size_t>(i)];
  }
  return error == cudaSuccess && out.host() == expected;
}

// Each warp turns its 32 x 32 tiles about, one after the other, through one tile of shared memory.
template <Flaw kFlaw>
__global__ void transpose(const float* x,  // [warps, kRounds, 32, 32]
                          float* out) {    // the same
  WP_SHARED(float, tiles, 4 * 32 * 33);
  const int lane = threadIdx.x % 32;
  float* tile = tiles + threadIdx.x / 32 * 32 * 33;
  for (int round = 0; round < kRounds; ++round) {
    const int begin = (static_cast<int>(threadIdx.x) / 32 * kRounds + round) * 1024;
    for (int row = 0; row < 32; ++row) {
      tile[row * 33 + lane] = x[begin + row * 32 + lane];
    }
    if (kFlaw == Flaw::kSyncwarpInBranch) {
      if (lane != 7) {
        __syncwarp();
      }
    } else if (kFlaw != Flaw::kNoSyncwarp) {
      __syncwarp();
    }
    for (int row = 0; row < 32; ++row) {
      out[begin + row * 32 + lane] = tile[lane * 33 + row];
    }
    if (kFlaw != Flaw::kNoSecondSyncwarp) {
      __syncwarp();
    }
  }
}

template <Flaw kFlaw>
bool run_transpose() {
  std::vector<float> x(4 * kRounds * 1024);
  std::iota(x.begin(), x.end(), 0.0f);
  const cuemu::DeviceBuffer<float> device_x(x);
  const cuemu::DeviceBuffer<float> out(x.size());
  const cudaError_t error =
      wp::launch(transpose<kFlaw>, dim3(1), dim3(kBlock), 0, nullptr, device_x.data(), out.data());
  std::vector<float> expected(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    expected[i] = x[i / 1024 * 1024 + i % 32 * 32 + i % 1024 / 32];
  }
  return error == cudaSuccess && out.host() == expected;
}

// Copies vectors, from an address that a kernel without a check takes for aligned.
__global__ void copy_vectors(const uint8_t* x, uint8_t* out) {  // [blockDim.x, 16]
  wp::store_16(out + threadIdx.x * 16, wp::load_16_streaming(x + threadIdx.x * 16));
}

template <Flaw kFlaw>
bool run_copy() {
  const std::vector<uint8_t> x(32 * 16, 7);
  const cuemu::DeviceBuffer<uint8_t> device_x(x, kFlaw == Flaw::kMisalignedVector ? 4 : 0);
  const cuemu::DeviceBuffer<uint8_t> out(x.size());
  const int threads = kFlaw == Flaw::kUnguardedRead ? 33 : 32;
  const cudaError_t error = wp::launch(copy_vectors, dim3(1), dim3(threads), 0, nullptr, device_x.data(), out.data());
  return error == cudaSuccess && out.host() == x;
}

using enum cuemu::Seen;

constexpr cuemu::Defect kDefects[] = {
    {"no barrier before the sums are read", run_sums<Flaw::kNoBarrierBeforeSums>, kAsWrong, kAlways, kAsWrong, "race"},
    {"no barrier before the sums are reused", run_sums<Flaw::kNoBarrierBeforeReuse>, kAsWrong, kAlways, kAsWrong,
     "race"},
    {"shared array one short", run_sums<Flaw::kArrayOneShort>, kAlways, kAlways, kAlways, "partial"},
    {"all lanes' shuffle in a branch", run_sums<Flaw::kShuffleInBranch>, kAlways, kAlways, kAlways, "__shfl_down_sync"},
    {"shuffle from a lane outside the mask", run_sums<Flaw::kShuffleFromOutside>, kAlways, kAlways, kAlways,
     "does not name"},
    {"shuffle whose mask lacks the caller", run_sums<Flaw::kShuffleMaskWithoutCaller>, kAlways, kAlways, kAlways,
     "does not name that lane"},
    {"vote after a lane has returned", run_sums<Flaw::kVoteAfterReturn>, kAlways, kAlways, kAlways, "ended"},
    {"return before a barrier", run_sums<Flaw::kEarlyReturn>, kAlways, kAlways, kAlways, "divergent barrier"},
    {"plain read beside atomics", run_sums<Flaw::kPlainReadOfAtomic>, kNever, kAlways, kNever, "race"},
    {"shared memory nobody wrote", run_sums<Flaw::kUnwrittenShared>, kAsWrong, kAsWrong, kAsWrong, ""},
    {"plain read past the end", run_sums<Flaw::kUnguardedRead>, kNever, kAlways, kAlways, "device allocation of 1600"},
    {"plain read before the begin", run_sums<Flaw::kReadBeforeBegin>, kNever, kAlways, kAlways,
     "before a device allocation"},
    {"no __syncwarp in a transpose", run_transpose<Flaw::kNoSyncwarp>, kAsWrong, kAlways, kAsWrong, "race"},
    {"no __syncwarp before a tile's reuse", run_transpose<Flaw::kNoSecondSyncwarp>, kAsWrong, kAlways, kAsWrong,
     "race"},
    {"a lane skips __syncwarp", run_transpose<Flaw::kSyncwarpInBranch>, kAlways, kAlways, kAlways, ""},
    {"vector at a misaligned address", run_copy<Flaw::kMisalignedVector>, kAlways, kAlways, kAlways, "multiple of 16"},
    {"vector past the end", run_copy<Flaw::kUnguardedRead>, kAlways, kAlways, kAlways, "device allocation of 512"},
};

TEST(defects_of_small_kernels_are_seen) {
  for (const cuemu::Defect& defect : kDefects) {
    cuemu::check_defect(defect, CUEMU_BUILD);
  }
}

TEST(sound_small_kernels_are_let_pass) {
  cuemu::check_sound("sums", run_sums<Flaw::kNone>);
  cuemu::check_sound("transpose", run_transpose<Flaw::kNone>);
  cuemu::check_sound("copy", run_copy<Flaw::kNone>);
}

}  // namespace
