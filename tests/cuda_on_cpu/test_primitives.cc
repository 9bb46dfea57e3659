// Each primitive of the emulator alone, against what the CUDA programming guide and the PTX manual say of it.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/harness.h"

using namespace qlora_native;

namespace {

__global__ void note_indices(int* out) {  // [grid, block]
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  atomicAdd(out + block * threads + thread, static_cast<int>(block * 1000 + thread));
}

TEST(every_thread_of_every_block_runs_once) {
  cuemu::over_all_schedules([](const char* schedule) {
    const cuemu::DeviceBuffer<int> out(std::vector<int>(3 * 4 * 2 * 5 * 7 * 2));
    CHECK_LAUNCH(wp::launch(note_indices, dim3(3, 4, 2), dim3(5, 7, 2), 0, nullptr, out.data()));
    const std::vector<int> got = out.host();
    for (int i = 0; i < static_cast<int>(got.size()); ++i) {
      const int expected = i / 70 * 1000 + i % 70;
      CHECK(got[static_cast<size_t>(i)] == expected, "%s: thread %d of block %d", schedule, i % 70, i / 70);
    }
  });
}

struct Parcel {
  int values[5];
  const float* pointer;
};

__global__ void unpack(const Parcel parcel, int64_t big, float* out) {
  out[0] = static_cast<float>(parcel.values[4]) + parcel.pointer[1];
  out[1] = static_cast<float>(big >> 40);
}

TEST(parameters_arrive_by_value) {
  const cuemu::DeviceBuffer<float> in(std::vector<float>{1.0f, 2.5f});
  const cuemu::DeviceBuffer<float> out(2);
  const Parcel parcel{{1, 2, 3, 4, 5}, in.data()};
  CHECK_LAUNCH(wp::launch(unpack, dim3(1), dim3(1), 0, nullptr, parcel, int64_t{3} << 40, out.data()));
  CHECK((out.host() == std::vector<float>{7.5f, 3.0f}), "parameters");
}

__global__ void shuffle(int kind, int distance, int width, uint32_t* out) {  // [32]
  const uint32_t lane = threadIdx.x;
  const uint32_t mine = 100 + lane;
  uint32_t got = 0;
  switch (kind) {
    case 0:
      got = __shfl_sync(0xffffffffu, mine, distance, width);
      break;
    case 1:
      got = __shfl_up_sync(0xffffffffu, mine, distance, width);
      break;
    case 2:
      got = __shfl_down_sync(0xffffffffu, mine, distance, width);
      break;
    default:
      got = __shfl_xor_sync(0xffffffffu, mine, distance, width);
  }
  out[lane] = got;
}

// The pseudo-code of PTX section 9.7.9.6, with clamp and segment mask packed as the programming guide's widths do.
uint32_t shuffled(int kind, int lane, int b, int width) {
  const int segment_mask = 32 - width;
  const int clamp = kind == 1 ? 0 : 31;
  const int max_lane = (lane & segment_mask) | (clamp & ~segment_mask);
  const int min_lane = lane & segment_mask;
  int from = 0;
  bool valid = false;
  switch (kind) {
    case 0:
      from = min_lane | (b & ~segment_mask & 31);
      valid = from <= max_lane;
      break;
    case 1:
      from = lane - b;
      valid = from >= max_lane;
      break;
    case 2:
      from = lane + b;
      valid = from <= max_lane;
      break;
    default:
      from = lane ^ b;
      valid = from <= max_lane;
  }
  return static_cast<uint32_t>(100 + (valid ? from : lane));
}

TEST(shuffles_of_every_width) {
  const cuemu::DeviceBuffer<uint32_t> out(32);
  for (int kind = 0; kind < 4; ++kind) {
    for (int width = 1; width <= 32; width *= 2) {
      for (int distance = 0; distance < 32; ++distance) {
        CHECK_LAUNCH(wp::launch(shuffle, dim3(1), dim3(32), 0, nullptr, kind, distance, width, out.data()));
        const std::vector<uint32_t> got = out.host();
        for (int lane = 0; lane < 32; ++lane) {
          const uint32_t expected = shuffled(kind, lane, distance, width);
          CHECK(got[static_cast<size_t>(lane)] == expected, "kind %d, width %d, distance %d, lane %d: %u, expected %u",
                kind, width, distance, lane, got[static_cast<size_t>(lane)], expected);
        }
      }
    }
  }
}

struct Votes {
  unsigned ballot, half_ballot, sum, all_bits, any_bits, odd_bits;
  int all, any, none, least, greatest;
  double wide;
};

__global__ void vote(Votes* out) {  // [32]
  const int lane = threadIdx.x % 32;
  Votes votes{};
  votes.ballot = __ballot_sync(0xffffffffu, lane % 3 == 0);
  if (lane < 16) {
    votes.half_ballot = __ballot_sync(0x0000ffffu, 1);
  } else {
    votes.half_ballot = __ballot_sync(0xffff0000u, lane % 2);
  }
  votes.all = __all_sync(0xffffffffu, lane < 32);
  votes.any = __any_sync(0xffffffffu, lane == 7);
  votes.none = __any_sync(0xffffffffu, 0);
  votes.sum = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(lane));
  votes.least = __reduce_min_sync(0xffffffffu, 3 - lane);
  votes.greatest = __reduce_max_sync(0xffffffffu, 3 - lane);
  votes.all_bits = __reduce_and_sync(0xffffffffu, 0xf0u | static_cast<unsigned>(lane));
  votes.any_bits = __reduce_or_sync(0xffffffffu, 1u << lane % 8);
  votes.odd_bits = __reduce_xor_sync(0xffffffffu, static_cast<unsigned>(lane));
  votes.wide = __shfl_sync(0xffffffffu, 0.1 * lane, 5);
  out[threadIdx.x] = votes;
}

TEST(votes_and_reductions) {
  cuemu::over_all_schedules([](const char* schedule) {
    const cuemu::DeviceBuffer<Votes> out(32);
    CHECK_LAUNCH(wp::launch(vote, dim3(1), dim3(32), 0, nullptr, out.data()));
    int lane = 0;
    for (const Votes& votes : out.host()) {
      CHECK(votes.ballot == 0x49249249u, "%s: %#x", schedule, votes.ballot);
      CHECK(votes.half_ballot == (lane < 16 ? 0xffffu : 0xaaaa0000u), "%#x", votes.half_ballot);
      CHECK(votes.all == 1 && votes.any == 1 && votes.none == 0, "all %d, any %d", votes.all, votes.any);
      CHECK(votes.sum == 496 && votes.least == -28 && votes.greatest == 3, "sum %u", votes.sum);
      CHECK(votes.all_bits == 0xf0u && votes.any_bits == 0xffu && votes.odd_bits == 0, "%#x", votes.all_bits);
      CHECK(votes.wide == 0.5, "%g", votes.wide);
      ++lane;
    }
  });
}

__global__ void vote_of_block(int* out) {  // [96, 3]
  const int thread = threadIdx.x;
  out[3 * thread] = __syncthreads_count(thread % 5 == 0);
  out[3 * thread + 1] = __syncthreads_and(thread < 96) + 10 * __syncthreads_and(thread != 50);
  out[3 * thread + 2] = __syncthreads_or(thread == 95) + 10 * __syncthreads_or(thread > 95);
}

TEST(votes_of_a_block) {
  cuemu::over_all_schedules([](const char* schedule) {
    const cuemu::DeviceBuffer<int> out(96 * 3);
    CHECK_LAUNCH(wp::launch(vote_of_block, dim3(1), dim3(96), 0, nullptr, out.data()));
    const std::vector<int> got = out.host();
    for (size_t i = 0; i < 96; ++i) {
      CHECK(got[3 * i] == 20 && got[3 * i + 1] == 1 && got[3 * i + 2] == 1, "%s: %d %d %d", schedule, got[3 * i],
            got[3 * i + 1], got[3 * i + 2]);
    }
  });
}

__global__ void count_atomically(unsigned* out, float* sum, unsigned long long* big) {
  WP_SHARED(unsigned, tickets, 1);
  if (threadIdx.x == 0) {
    tickets[0] = 0;
  }
  __syncthreads();
  const unsigned ticket = atomicAdd(tickets, 1u);
  out[blockIdx.x * blockDim.x + ticket] = ticket;
  atomicAdd(sum, 0.5f);
  atomicMax(big, static_cast<unsigned long long>(threadIdx.x) << 40);
  unsigned seen = atomicInc(out + 200, 6u);
  (void)seen;
  atomicCAS(out + 201, 0u, 9u);
  atomicExch(out + 202, 3u);
}

TEST(atomics) {
  cuemu::over_all_schedules([](const char* schedule) {
    const cuemu::DeviceBuffer<unsigned> out(std::vector<unsigned>(203));
    const cuemu::DeviceBuffer<float> sum(std::vector<float>(1));
    const cuemu::DeviceBuffer<unsigned long long> big(std::vector<unsigned long long>(1));
    CHECK_LAUNCH(wp::launch(count_atomically, dim3(2), dim3(100), 0, nullptr, out.data(), sum.data(), big.data()));
    const std::vector<unsigned> got = out.host();
    for (unsigned i = 0; i < 200; ++i) {
      CHECK(got[i] == i % 100, "%s: %u", schedule, got[i]);
    }
    CHECK(got[200] == 200 % 7 && got[201] == 9 && got[202] == 3, "%u %u %u", got[200], got[201], got[202]);
    CHECK(sum.host()[0] == 100.0f && big.host()[0] == 99ull << 40, "%g", static_cast<double>(sum.host()[0]));
  });
}

// Every count of source bytes; the second of two groups may be in flight when the first is used.
__global__ void copy_some(const uint8_t* x, uint8_t* out) {  // [17, 16] both
  uint8_t* shared = wp::dyn_smem<uint8_t>();
  const int row = threadIdx.x;
  wp::cp_async_16(shared + 16 * row, row > 0 ? x + 16 * row : x, row);
  wp::cp_async_commit();
  wp::cp_async_16(shared + 16 * (17 + row), x, 16);
  wp::cp_async_commit();
  wp::cp_async_commit();  // an empty group
  wp::cp_async_wait<2>();
  wp::store_16(out + 16 * row, wp::load_16(shared + 16 * row));
  wp::cp_async_wait<0>();
}

void check_copies() {
  std::vector<uint8_t> x(17 * 16);
  std::iota(x.begin(), x.end(), uint8_t{1});
  const cuemu::DeviceBuffer<uint8_t> in(x);
  cuemu::over_all_schedules([&](const char* schedule) {
    const cuemu::DeviceBuffer<uint8_t> out(17 * 16);
    CHECK_LAUNCH(wp::launch(copy_some, dim3(1), dim3(17), 2 * 17 * 16, nullptr, in.data(), out.data()));
    const std::vector<uint8_t> got = out.host();
    for (size_t i = 0; i < got.size(); ++i) {
      const uint8_t expected = i % 16 < i / 16 ? x[i] : uint8_t{0};
      CHECK(got[i] == expected, "%s: byte %zu of %zu", schedule, i % 16, i / 16);
    }
  });
}

TEST(asynchronous_copies_fill_up_with_zeros) { check_copies(); }

TEST(asynchronous_copies_on_sm_75) {
  const cuemu::WithDevice turing(75);
  check_copies();
}

__global__ void multiply_bf16() {
  float d[4] = {};
  const uint32_t a[4] = {};
  const uint32_t b[2] = {};
  wp::mma_m16n8k16<Bf16>(d, a, b);
}

__global__ void reduce() { (void)__reduce_add_sync(0xffffffffu, 1); }

TEST(what_sm_75_lacks_is_refused) {
  const cuemu::WithDevice turing(75);
  cuemu::print_reports(false);
  CHECK(wp::launch(multiply_bf16, dim3(1), dim3(32), 0, nullptr) == cudaErrorLaunchFailure, "bf16");
  CHECK(cuemu::take_reports().find("sm_75 has none") != std::string::npos, "bf16");
  CHECK(wp::launch(reduce, dim3(1), dim3(32), 0, nullptr) == cudaErrorLaunchFailure, "__reduce_add_sync");
  CHECK(cuemu::take_reports().find("sm_75 has none") != std::string::npos, "__reduce_add_sync");
  cuemu::print_reports(true);
}

template <int kElements>
__global__ void use_shared(float* out) {
  WP_SHARED(float, array, kElements);
  array[threadIdx.x] = 1.0f;
  out[threadIdx.x] = array[threadIdx.x] + static_cast<float>(sizeof(array) / sizeof(float));
}

TEST(shared_memory_is_limited_by_the_architecture) {
  const cuemu::DeviceBuffer<float> out(1);
  for (const int sm : {75, 80, 86, 89, 90, 100, 120}) {
    const cuemu::WithDevice device(sm);
    const size_t most = cuemu::device().shared_bytes_per_block;
    CHECK_LAUNCH(wp::launch(use_shared<1024>, dim3(1), dim3(1), most - 4096, nullptr, out.data()));
    CHECK(out.host()[0] == 1025.0f, "an array has its size");
    CHECK(wp::launch(use_shared<1024>, dim3(1), dim3(1), most + 1, nullptr, out.data()) == cudaErrorInvalidValue,
          "sm_%d", sm);
    cuemu::print_reports(false);
    CHECK(wp::launch(use_shared<1024>, dim3(1), dim3(1), most - 4095, nullptr, out.data()) == cudaErrorLaunchFailure,
          "sm_%d", sm);
    CHECK(cuemu::take_reports().find("shared array") != std::string::npos, "sm_%d", sm);
    cuemu::print_reports(true);
  }
}

TEST(launches_out_of_bounds_are_refused) {
  const auto error_of = [](dim3 grid, dim3 block) { return wp::launch(reduce, grid, block, 0, nullptr); };
  CHECK(error_of(dim3(0), dim3(32)) == cudaErrorInvalidConfiguration, "no block");
  CHECK(error_of(dim3(1), dim3(0)) == cudaErrorInvalidConfiguration, "no thread");
  CHECK(error_of(dim3(1), dim3(1025)) == cudaErrorInvalidConfiguration, "1025 threads");
  CHECK(error_of(dim3(1), dim3(1, 1, 65)) == cudaErrorInvalidConfiguration, "depth 65");
  CHECK(error_of(dim3(1, 65536), dim3(32)) == cudaErrorInvalidConfiguration, "65536 rows of blocks");
  CHECK(cudaGetLastError() == cudaSuccess, "wp::launch leaves no error behind");
}

TEST(arithmetic_under_cudas_names) {
  for (unsigned selector = 0; selector < 0x10000u; selector += 0x35u) {
    unsigned expected = 0;
    const uint8_t bytes[8] = {0x81, 0x12, 0x93, 0x24, 0xa5, 0x36, 0xb7, 0x48};
    for (int i = 0; i < 4; ++i) {
      const unsigned nibble = selector >> (4 * i) & 15;
      const unsigned byte = bytes[nibble & 7];
      expected |= (nibble < 8 ? byte : byte >= 128 ? 255u : 0u) << (8 * i);
    }
    CHECK(__byte_perm(0x24931281u, 0x48b736a5u, selector) == expected, "selector %#x", selector);
  }
  CHECK(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0, "bits");
  CHECK(__brev(1u) == 0x80000000u && __brev(0x80000001u) == 0x80000001u, "__brev");
  CHECK(__funnelshift_l(0x80000000u, 1u, 1) == 3u && __funnelshift_r(2u, 1u, 1) == 0x80000001u, "funnels");
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __float2int_rz(-2.9f) == -2, "to integer");
  CHECK(__float2int_rn(1e20f) == std::numeric_limits<int>::max(), "too large for an integer");
  CHECK(__float2int_rn(std::nanf("")) == 0 && __float2uint_rn(-3.0f) == 0, "no integer");
  const float a = 1.0f + 0x1p-12f;
  CHECK(__fmaf_rn(a, a, -1.0f) == 0x1p-11f + 0x1p-24f, "a product that is not rounded");
  CHECK(__fadd_rn(__fmul_rn(a, a), -1.0f) == 0x1p-11f, "a product that is");
  CHECK(max(std::nanf(""), 1.0f) == 1.0f && min(2, 3) == 2, "min and max");
}

// 16-bit words from floats: as core/half.h rounds.
TEST(words_are_packed_as_the_core_rounds) {
  for (uint32_t i = 0; i < 70000; ++i) {
    const uint32_t bits = i * 61357u;
    float values[2];
    std::memcpy(&values[0], &bits, 4);
    values[1] = static_cast<float>(i) * 0x1p-26f;
    if (std::isnan(values[0])) {
      continue;
    }
    const uint32_t bf16 = from_float<Bf16>(values[0]).bits | uint32_t{from_float<Bf16>(values[1]).bits} << 16;
    const uint32_t fp16 = from_float<Fp16>(values[0]).bits | uint32_t{from_float<Fp16>(values[1]).bits} << 16;
    CHECK(wp::pack_word<Bf16>(values) == bf16, "bf16 of %a", static_cast<double>(values[0]));
    CHECK(wp::pack_word<Fp16>(values) == fp16, "fp16 of %a", static_cast<double>(values[0]));
  }
}

}  // namespace
