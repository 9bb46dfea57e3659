// What a kernel may address, what it sees of other blocks' writes, and its bank conflicts: one mistake at a time, and
// the sound form of each.
#include <cuda_runtime_api.h>

#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/address_space.h"
#include "cuda_on_cpu/banks.h"
#include "cuda_on_cpu/defects.h"
#include "cuda_on_cpu/managed.h"
#include "cuda_on_cpu/sanitizers.h"

using namespace qlora_native;

namespace {

using enum cuemu::Seen;

constexpr bool kEveryAccess = std::string_view(CUEMU_BUILD) == "race";  // is looked at

#define CHECK_SAYS(report, words) \
  CHECK((report).find(words) != std::string::npos, "expected '%s' in: %s", std::string(words).c_str(), (report).c_str())

// ---------------------------------------------------------------------------------------------------------------------
// Address spaces

constexpr int kRows = 8;

// x[target] of each row: what a loss does with its labels.
template <typename Label>
__global__ void gather(const float* x,       // [rows, 4]
                       const Label* labels,  // [rows]
                       const float* bias,    // [rows] or null
                       float* out) {         // [rows]
  const unsigned row = threadIdx.x;
  const auto label = static_cast<int64_t>(__ldg(labels + row));
  const float value = __ldg(x + row * 4 + (label & 3));
  out[row] = value + (bias != nullptr ? __ldg(bias + row) : 0.0f);
}

struct Operands {
  std::vector<int64_t> labels = std::vector<int64_t>(kRows, 1);
  std::vector<int> short_labels = std::vector<int>(kRows, 1);
  std::vector<float> bias = std::vector<float>(kRows, 2.0f);
  cuemu::DeviceBuffer<float> x{std::vector<float>(4 * kRows, 3.0f)};
  cuemu::DeviceBuffer<int64_t> device_labels{labels};
  cuemu::DeviceBuffer<int> device_short_labels{short_labels};
  cuemu::DeviceBuffer<float> device_bias{bias};
  cuemu::DeviceBuffer<float> out{kRows};

  bool run(const int64_t* with_labels, const float* with_bias) {
    const cudaError_t error =
        wp::launch(gather<int64_t>, dim3(1), dim3(kRows), 0, nullptr, x.data(), with_labels, with_bias, out.data());
    return error == cudaSuccess && out.host() == std::vector<float>(kRows, with_bias != nullptr ? 5.0f : 3.0f);
  }
};

bool run_sound() {
  Operands operands;
  return operands.run(operands.device_labels.data(), operands.device_bias.data());
}

bool run_labels_on_host() {
  Operands operands;
  return operands.run(operands.labels.data(), nullptr);
}

bool run_bias_on_host() {
  Operands operands;
  return operands.run(operands.device_labels.data(), operands.bias.data());
}

bool run_labels_on_stack() {
  Operands operands;
  const int64_t labels[kRows] = {};
  return operands.run(labels, nullptr);
}

bool run_short_labels() {  // int32, read as int64
  Operands operands;
  return operands.run(reinterpret_cast<const int64_t*>(operands.device_short_labels.data()), nullptr);
}

bool run_freed_labels() {
  Operands operands;
  void* labels = nullptr;
  cudaMalloc(&labels, sizeof(int64_t) * kRows);
  cudaMemset(labels, 0, sizeof(int64_t) * kRows);
  cudaFree(labels);
  return operands.run(static_cast<const int64_t*>(labels), nullptr);
}

// The mistakes of plain accesses, which the other builds do not look at unless they fault.
__global__ void read_plainly(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x]; }

bool run_plain(const float* x) {
  const cuemu::DeviceBuffer<float> out(kRows);
  return wp::launch(read_plainly, dim3(1), dim3(kRows), 0, nullptr, x, out.data()) == cudaSuccess;
}

bool run_plain_from_host() {
  const std::vector<float> x(kRows);
  return run_plain(x.data());
}

bool run_plain_from_freed() {
  void* x = nullptr;
  cudaMalloc(&x, sizeof(float) * kRows);
  cudaFree(x);
  return run_plain(static_cast<const float*>(x));
}

bool run_plain_from_nowhere() { return run_plain(reinterpret_cast<const float*>(uintptr_t{4096})); }

// Both devices are of one process; the kernel runs on device 0.
template <bool kPeers>
bool run_other_devices_labels() {
  cuemu::set_num_devices(2);
  cudaSetDevice(1);
  const cuemu::DeviceBuffer<int64_t> labels(std::vector<int64_t>(kRows, 1));
  cudaSetDevice(0);
  if (kPeers) {
    cudaDeviceEnablePeerAccess(1, 0);
  }
  Operands operands;
  return operands.run(labels.data(), nullptr);
}

bool run_pinned_and_managed() {
  Operands operands;
  void* labels = nullptr;
  void* bias = nullptr;
  cudaMallocHost(&labels, sizeof(int64_t) * kRows);
  cudaMallocManaged(&bias, sizeof(float) * kRows, cudaMemAttachGlobal);
  std::copy_n(operands.labels.begin(), kRows, static_cast<int64_t*>(labels));
  std::copy_n(operands.bias.begin(), kRows, static_cast<float*>(bias));
  return operands.run(static_cast<const int64_t*>(labels), static_cast<const float*>(bias));
}

constexpr cuemu::Defect kAddresses[] = {
    {"labels on the host", run_labels_on_host, kAlways, kAlways, kAlways, "pageable memory of the host"},
    {"bias on the host", run_bias_on_host, kAlways, kAlways, kAlways, "pageable memory of the host"},
    {"labels on the stack", run_labels_on_stack, kAlways, kAlways, kAlways, "the stack of the host's thread"},
    {"int32 labels", run_short_labels, kAlways, kAlways, kAlways, "device allocation of 32 bytes"},
    {"labels after cudaFree", run_freed_labels, kAlways, kAlways, kAlways, "cudaFree has taken back"},
    {"labels of another device", run_other_devices_labels<false>, kAlways, kAlways, kAlways, "memory of device 1"},
    {"plain read of the host's memory", run_plain_from_host, kNever, kAlways, kNever, "pageable memory of the host"},
    {"plain read after cudaFree", run_plain_from_freed, kAlways, kAlways, kAlways, "cudaFree has taken back"},
    {"plain read of no memory", run_plain_from_nowhere, kAlways, kAlways, kAlways, "where nothing lies"},
};

TEST(addresses_that_a_kernel_may_not_use_are_seen) {
  for (const cuemu::Defect& defect : kAddresses) {
    cuemu::check_defect(defect, CUEMU_BUILD);
  }
}

TEST(addresses_that_a_kernel_may_use_are_let_pass) {
  cuemu::check_sound("device memory", run_sound);
  cuemu::check_sound("pinned and managed memory", run_pinned_and_managed);
  cuemu::check_sound("memory of a peer", run_other_devices_labels<true>);
}

__global__ void use_what_is_its_own(float* out, const float (*table)[4]) {
  float local[8] = {};
  local[threadIdx.x] = (*table)[threadIdx.x % 4];
  out[threadIdx.x] = local[threadIdx.x % 8];
}

// As torch's memory in the tests of ops: registered, not allocated here.
TEST(registered_memory_has_bounds) {
  std::vector<float> table(4, 1.0f);
  std::vector<float> out(9);
  cuemu::add_range(table.data(), 16, cuemu::Kind::kDevice);
  cuemu::add_range(out.data(), 32, cuemu::Kind::kDevice);
  const auto launch = [&](int threads) {
    return wp::launch(use_what_is_its_own, dim3(1), dim3(threads), 0, nullptr, out.data(),
                      reinterpret_cast<const float (*)[4]>(table.data()));
  };
  CHECK_LAUNCH(launch(8));
  if (kEveryAccess) {
    cuemu::print_reports(false);
    cuemu::add_range(table.data(), 16, cuemu::Kind::kHost);
    CHECK(launch(8) == cudaErrorIllegalAddress, "host memory");
    CHECK_SAYS(cuemu::take_reports(), "byte 0 of 16 bytes of memory of the host");
    cuemu::forget_range(table.data());
    CHECK(launch(8) == cudaErrorIllegalAddress, "unknown memory");
    cuemu::set_strict(false);
    CHECK_LAUNCH(launch(8));
    cuemu::set_strict(true);
    cuemu::print_reports(true);
    (void)cuemu::take_reports();
  }
  cuemu::forget_range(table.data());
  cuemu::forget_range(out.data());
}

#if !defined(CUEMU_ASAN)  // which would end the process
TEST(the_host_may_not_touch_device_memory) {
  cuemu::close_to_host(true);
  cuemu::print_reports(false);
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, 100) == cudaSuccess && cudaMemset(memory, 0, 100) == cudaSuccess, "memory");
  const cuemu::DeviceBuffer<float> out(kRows);
  CHECK_LAUNCH(
      wp::launch(read_plainly, dim3(1), dim3(kRows), 0, nullptr, static_cast<const float*>(memory), out.data()));
  CHECK(out.host()[3] == 0.0f && cuemu::take_reports().empty(), "a kernel and copies may");
  static_cast<volatile char*>(memory)[99] = 1;
  CHECK_SAYS(cuemu::take_reports(), "the host touches byte 99 of 100 bytes of memory of device 0");
  CHECK(cudaFree(memory) == cudaSuccess, "freed");
  cuemu::print_reports(true);
  cuemu::close_to_host(false);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Fences

enum class Fences { kBoth, kNoneByWriter, kNoneByReader, kByOneThreadAfterBarrier, kBeforeTheStore };

// Each block leaves a partial sum, the last one to finish adds them up.
template <Fences kFences>
__global__ void sum_in_parts(const float* x,      // [gridDim.x, 32]
                             float* parts,        // [gridDim.x, 32]
                             unsigned* finished,  // [1], zero
                             float* sum) {        // [1]
  WP_SHARED(unsigned, before, 1);
  if (kFences == Fences::kBeforeTheStore) {
    __threadfence();
  }
  __stcg(parts + blockIdx.x * 32 + threadIdx.x, x[blockIdx.x * 32 + threadIdx.x]);
  if (kFences == Fences::kBoth || kFences == Fences::kNoneByReader) {
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kFences == Fences::kByOneThreadAfterBarrier) {
      __threadfence();
    }
    before[0] = atomicAdd(finished, 1u);
    if (kFences != Fences::kNoneByReader) {
      __threadfence();
    }
  }
  __syncthreads();
  if (before[0] == gridDim.x - 1 && threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned i = 0; i < gridDim.x * 32; ++i) {
      total += __ldcg(parts + i);
    }
    *sum = total;
  }
}

template <Fences kFences>
bool run_sum() {
  const cuemu::DeviceBuffer<float> x(std::vector<float>(3 * 32, 1.0f));
  const cuemu::DeviceBuffer<float> parts(3 * 32);
  const cuemu::DeviceBuffer<unsigned> finished(std::vector<unsigned>{0});
  const cuemu::DeviceBuffer<float> sum(1);
  const cudaError_t error = wp::launch(sum_in_parts<kFences>, dim3(3), dim3(32), 0, nullptr, x.data(), parts.data(),
                                       finished.data(), sum.data());
  return error == cudaSuccess && sum.host()[0] == 96.0f;
}

__global__ void overwrite(float* out) { __stcg(out, static_cast<float>(blockIdx.x)); }

bool run_overwrite() {
  const cuemu::DeviceBuffer<float> out(1);
  return wp::launch(overwrite, dim3(2), dim3(1), 0, nullptr, out.data()) == cudaSuccess;
}

bool run_two_launches() {  // a launch sees what the one before wrote
  const cuemu::DeviceBuffer<float> out(1);
  return wp::launch(overwrite, dim3(1), dim3(1), 0, nullptr, out.data()) == cudaSuccess &&
         wp::launch(overwrite, dim3(1), dim3(1), 0, nullptr, out.data()) == cudaSuccess && out.host()[0] == 0.0f;
}

constexpr cuemu::Defect kFenceDefects[] = {
    {"an unfenced partial sum", run_sum<Fences::kNoneByWriter>, kAlways, kAlways, kAlways, "did not publish"},
    {"a fence before the partial sum", run_sum<Fences::kBeforeTheStore>, kAlways, kAlways, kAlways, "did not publish"},
    {"no fence before the total", run_sum<Fences::kNoneByReader>, kAlways, kAlways, kAlways, "with no atomic and"},
    {"two blocks write one place", run_overwrite, kAlways, kAlways, kAlways, "did not publish"},
};

TEST(missing_fences_are_seen) {
  for (const cuemu::Defect& defect : kFenceDefects) {
    cuemu::check_defect(defect, CUEMU_BUILD);
  }
}

TEST(fenced_sums_are_let_pass) {
  cuemu::check_sound("a fence by every thread", run_sum<Fences::kBoth>);
  cuemu::check_sound("a fence by one thread", run_sum<Fences::kByOneThreadAfterBarrier>);
  cuemu::check_sound("two launches", run_two_launches);
}

// ---------------------------------------------------------------------------------------------------------------------
// Bank conflicts

// Rows of 32 floats are written, columns are read; the rows lie kStride apart, or their elements are swizzled.
template <int kStride, bool kSwizzle>
__global__ void transpose(const float* x, float* out) {  // [32, 32]
  WP_SHARED(uint4, memory, 32 * 36 / 4);
  auto* tile = reinterpret_cast<float*>(memory);
  const unsigned lane = threadIdx.x;
  for (unsigned row = 0; row < 32; ++row) {
    tile[row * kStride + (kSwizzle ? lane ^ row : lane)] = x[row * 32 + lane];
  }
  __syncwarp();
  for (unsigned row = 0; row < 32; ++row) {
    out[row * 32 + lane] = tile[lane * kStride + (kSwizzle ? lane ^ row : row)];
  }
}

__global__ void read_vectors(unsigned stride) {  // in elements of 16 bytes
  WP_SHARED(uint4, memory, 32 * 8);
  (void)wp::load_16(memory + threadIdx.x * stride);
  (void)wp::load_16(memory);  // a broadcast
}

cuemu::BankCount total_of_banks() {
  cuemu::BankCount total{};
  for (const cuemu::BankCount& count : cuemu::take_bank_counts()) {
    total.accesses += count.accesses;
    total.passes += count.passes;
    total.least += count.least;
  }
  return total;
}

cuemu::BankCount banks_of_vectors(unsigned stride) {
  cuemu::watches_banks = true;
  CHECK_LAUNCH(wp::launch(read_vectors, dim3(1), dim3(32), 0, nullptr, stride));
  cuemu::watches_banks = false;
  return total_of_banks();
}

template <int kStride, bool kSwizzle>
cuemu::BankCount banks_of_transpose() {
  std::vector<float> x(1024);
  std::iota(x.begin(), x.end(), 0.0f);
  const cuemu::DeviceBuffer<float> device_x(x);
  const cuemu::DeviceBuffer<float> out(1024);
  cuemu::watches_banks = true;
  CHECK_LAUNCH(wp::launch(transpose<kStride, kSwizzle>, dim3(1), dim3(32), 0, nullptr, device_x.data(), out.data()));
  cuemu::watches_banks = false;
  CHECK(out.host()[33] == 33.0f && out.host()[1] == 32.0f, "transposed");
  return total_of_banks();
}

TEST(bank_conflicts_are_counted) {
  for (const auto& [stride, passes] : {std::pair{1u, 4u}, {2u, 8u}, {8u, 32u}}) {
    const cuemu::BankCount total = banks_of_vectors(stride);
    CHECK(total.accesses == 2 && total.least == 8 && total.passes == passes + 4, "stride %u: %d passes of %d", stride,
          static_cast<int>(total.passes), static_cast<int>(total.least));
  }
  if (kEveryAccess) {
    const cuemu::BankCount unswizzled = banks_of_transpose<32, false>();
    CHECK(unswizzled.accesses == 64 && unswizzled.least == 64 && unswizzled.passes == 32 + 32 * 32, "%d passes of %d",
          static_cast<int>(unswizzled.passes), static_cast<int>(unswizzled.least));
    for (const cuemu::BankCount& sound : {banks_of_transpose<33, false>(), banks_of_transpose<32, true>()}) {
      CHECK(sound.accesses == 64 && sound.passes == 64, "%d passes", static_cast<int>(sound.passes));
    }
  }
}

}  // namespace
