// A product with two stages of asynchronous copies, sound and with one defect at a time.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/defects.h"

using namespace qlora_native;

namespace {

enum class Flaw {
  kNone,
  kNoBarrierAfterWait,
  kNoTrailingBarrier,
  kWarpBarrierForBlock,
  kNoWait,
  kWaitTooWeak,
  kNoCommit,
  kWrongRow,
  kMisalignedRow,
  kShortShared,
  kSwappedA,
  kSwappedB,
  kTransForPlain,
  kUnguardedRead,
  kUnguardedWrite,
  kWrongZeroFill,
  kLaneSkipsLoad,
  kLaneSkipsProduct,
  kDivergentBarrier,
  kBarrierInBranch,
  kUnwaitedCopyAtExit,
  kUnclearedSums,
};

constexpr int kTile = 32;
constexpr int kStride = kTile + 8;           // elements of a row in shared memory: no two rows of 8 share a bank
constexpr int kStage = 2 * kTile * kStride;  // elements: the tile of a, then that of b
constexpr size_t kSharedBytes = 2 * kStage * sizeof(Bf16);
constexpr int kBlock = 128;

// Rows `row` of a and b, columns [k, k + 32) of both, into one stage; what lies outside is zero.
template <Flaw kFlaw>
__device__ void load_stage(Bf16* stage,                   // [64, kStride], shared
                           const Bf16* a, const Bf16* b,  // [M, K], [N, K]
                           int M, int N, int K, int k) {
  for (int chunk = static_cast<int>(threadIdx.x); chunk < 2 * kTile * 4; chunk += kBlock) {
    const int row = chunk / 4;
    const int column = k + chunk % 4 * 8;
    const bool of_a = row < kTile;
    const int global_row =
        (of_a ? static_cast<int>(blockIdx.y) * kTile + row : static_cast<int>(blockIdx.x) * kTile + row - kTile);
    const Bf16* matrix = of_a ? a : b;
    bool inside = global_row < (of_a ? M : N) && column < K;
    if (kFlaw == Flaw::kUnguardedRead) {
      inside = column < K;
    }
    const Bf16* from = inside ? matrix + static_cast<ptrdiff_t>(global_row) * K + column : matrix;
    int bytes = inside ? 16 : 0;
    if (kFlaw == Flaw::kWrongZeroFill) {
      bytes = 16;
    }
    wp::cp_async_16(stage + row * kStride + chunk % 4 * 8, from, bytes);
  }
}

// c = a b^T. Four warps, each with 16 x 16 of the tile.
template <Flaw kFlaw>
__global__ void product(const Bf16* a, const Bf16* b, float* c, int M, int N, int K) {
  Bf16* shared = wp::dyn_smem<Bf16>();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int top = thread / 64 * 16;
  const int left = thread / 32 % 2 * 16;
  float sums[2][4];
  if (kFlaw != Flaw::kUnclearedSums) {
    for (auto& half : sums) {
      for (float& sum : half) {
        sum = 0.0f;
      }
    }
  }
  load_stage<kFlaw>(shared, a, b, M, N, K, 0);
  wp::cp_async_commit();
  const int tiles = (K + kTile - 1) / kTile;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles || kFlaw == Flaw::kUnwaitedCopyAtExit) {
      load_stage<kFlaw>(shared + (tile + 1) % 2 * kStage, a, b, M, N, K, (tile + 1) % tiles * kTile);
    }
    if (kFlaw != Flaw::kNoCommit) {
      wp::cp_async_commit();
    }
    if (kFlaw == Flaw::kWaitTooWeak) {
      wp::cp_async_wait<2>();
    } else if (kFlaw != Flaw::kNoWait) {
      wp::cp_async_wait<1>();
    }
    if (kFlaw == Flaw::kWarpBarrierForBlock) {
      __syncwarp();
    } else if (kFlaw == Flaw::kBarrierInBranch) {
      if (thread < 64) {
        __syncthreads();
      }
    } else if (kFlaw != Flaw::kNoBarrierAfterWait) {
      __syncthreads();
    }
    Bf16* stage = shared + tile % 2 * kStage;
    for (int k = 0; k < kTile; k += 16) {
      uint32_t a_words[4] = {};
      uint32_t b_words[4] = {};
      int row = top + lane % 16;
      row += kFlaw == Flaw::kWrongRow ? 1 : 0;
      const Bf16* a_row = stage + row * kStride + k + lane / 16 * 8;
      if (kFlaw == Flaw::kMisalignedRow) {
        a_row += 4;
      }
      if (kFlaw != Flaw::kLaneSkipsLoad || lane != 31) {
        wp::ldmatrix_x4(a_words, a_row);
      }
      const Bf16* b_row = stage + (kTile + left + lane % 8 + lane / 16 * 8) * kStride + k + lane / 8 % 2 * 8;
      if (kFlaw == Flaw::kTransForPlain) {
        wp::ldmatrix_x4_trans(b_words, b_row);
      } else {
        wp::ldmatrix_x4(b_words, b_row);
      }
      if (kFlaw == Flaw::kSwappedA) {
        const uint32_t kept = a_words[1];
        a_words[1] = a_words[2];
        a_words[2] = kept;
      }
      for (int half = 0; half < 2; ++half) {
        const bool swapped = kFlaw == Flaw::kSwappedB;
        const uint32_t pair[2] = {b_words[2 * half + (swapped ? 1 : 0)], b_words[2 * half + (swapped ? 0 : 1)]};
        if (kFlaw != Flaw::kLaneSkipsProduct || lane < 16) {
          wp::mma_m16n8k16<Bf16>(sums[half], a_words, pair);
        }
      }
    }
    if (kFlaw == Flaw::kDivergentBarrier && thread == 5) {
      __syncthreads();
    } else if (kFlaw != Flaw::kNoTrailingBarrier) {
      __syncthreads();
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int row = static_cast<int>(blockIdx.y) * kTile + top + lane / 4 + i / 2 * 8;
      const int column = static_cast<int>(blockIdx.x) * kTile + left + half * 8 + lane % 4 * 2 + i % 2;
      if (column < N && (row < M || kFlaw == Flaw::kUnguardedWrite)) {
        c[static_cast<ptrdiff_t>(row) * N + column] = sums[half][i];
      }
    }
  }
}

constexpr int kM = 35;
constexpr int kN = 50;
constexpr int kK = 200;

std::vector<Bf16> random_matrix(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Bf16> values;
  for (size_t i = 0; i < count; ++i) {
    values.push_back(from_float<Bf16>(static_cast<float>(random() % 2001) / 1000.0f - 1.0f));
  }
  return values;
}

bool is_right(const std::vector<float>& c, const std::vector<Bf16>& a, const std::vector<Bf16>& b) {
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      double sum = 0.0;
      for (int k = 0; k < kK; ++k) {
        sum += static_cast<double>(to_float(a[static_cast<size_t>(m * kK + k)])) *
               static_cast<double>(to_float(b[static_cast<size_t>(n * kK + k)]));
      }
      if (!(std::abs(sum - static_cast<double>(c[static_cast<size_t>(m * kN + n)])) < 1e-4)) {
        return false;
      }
    }
  }
  return true;
}

template <Flaw kFlaw>
bool run() {
  const std::vector<Bf16> a = random_matrix(kM * kK, 1);
  const std::vector<Bf16> b = random_matrix(kN * kK, 2);
  const cuemu::DeviceBuffer<Bf16> device_a(a);
  const cuemu::DeviceBuffer<Bf16> device_b(b);
  const cuemu::DeviceBuffer<float> c(kM * kN);
  const size_t bytes = kSharedBytes - (kFlaw == Flaw::kShortShared ? kStride * sizeof(Bf16) : 0);
  const dim3 grid((kN + kTile - 1) / kTile, (kM + kTile - 1) / kTile);
  const cudaError_t error = wp::launch(product<kFlaw>, grid, dim3(kBlock), bytes, nullptr, device_a.data(),
                                       device_b.data(), c.data(), kM, kN, kK);
  return error == cudaSuccess && is_right(c.host(), a, b);
}

using enum cuemu::Seen;

constexpr cuemu::Defect kDefects[] = {
    {"no barrier after the wait", run<Flaw::kNoBarrierAfterWait>, kAlways, kAlways, kAlways, ""},
    {"no trailing barrier", run<Flaw::kNoTrailingBarrier>, kAlways, kAlways, kAlways, ""},
    {"__syncwarp for __syncthreads", run<Flaw::kWarpBarrierForBlock>, kAlways, kAlways, kAlways, ""},
    {"no wait for copies", run<Flaw::kNoWait>, kAlways, kAlways, kAlways, "in flight"},
    {"wait<2> for wait<1>", run<Flaw::kWaitTooWeak>, kAlways, kAlways, kAlways, "in flight"},
    {"copies never committed", run<Flaw::kNoCommit>, kAlways, kAlways, kAlways, "in flight"},
    {"ldmatrix one row further", run<Flaw::kWrongRow>, kAsWrong, kAsWrong, kAsWrong, ""},
    {"ldmatrix of a misaligned row", run<Flaw::kMisalignedRow>, kAlways, kAlways, kAlways, "multiple of 16"},
    {"shared memory one row short", run<Flaw::kShortShared>, kAlways, kAlways, kAlways, "dynamic shared memory"},
    {"registers of a swapped", run<Flaw::kSwappedA>, kAsWrong, kAsWrong, kAsWrong, ""},
    {"registers of b swapped", run<Flaw::kSwappedB>, kAsWrong, kAsWrong, kAsWrong, ""},
    {"ldmatrix transposes by mistake", run<Flaw::kTransForPlain>, kAsWrong, kAsWrong, kAsWrong, ""},
    {"rows of a read without a guard", run<Flaw::kUnguardedRead>, kAlways, kAlways, kAlways, "device allocation"},
    {"rows of c written without a guard", run<Flaw::kUnguardedWrite>, kAlways, kAlways, kAlways, "past the end"},
    {"edges filled with data", run<Flaw::kWrongZeroFill>, kAsWrong, kAsWrong, kAsWrong, ""},
    {"a lane skips ldmatrix", run<Flaw::kLaneSkipsLoad>, kAlways, kAlways, kAlways, "ldmatrix_x4"},
    {"half a warp skips mma", run<Flaw::kLaneSkipsProduct>, kAlways, kAlways, kAlways, "mma_m16n8k16"},
    {"a thread waits at another barrier", run<Flaw::kDivergentBarrier>, kAlways, kAlways, kAlways, "divergent barrier"},
    {"half the block skips a barrier", run<Flaw::kBarrierInBranch>, kAlways, kAlways, kAlways, ""},
    {"a copy in flight at the end", run<Flaw::kUnwaitedCopyAtExit>, kAlways, kAlways, kAlways, "without having waited"},
    {"sums not cleared", run<Flaw::kUnclearedSums>, kAsWrong, kAsWrong, kAsWrong, ""},
};

TEST(defects_of_a_product_are_seen) {
  for (const cuemu::Defect& defect : kDefects) {
    cuemu::check_defect(defect, CUEMU_BUILD);
  }
}

TEST(a_sound_product_is_let_pass) { cuemu::check_sound("product", run<Flaw::kNone>); }

}  // namespace
