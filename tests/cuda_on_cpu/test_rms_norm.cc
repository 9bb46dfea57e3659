// The shipped kernels against the CPU op, bit for bit.
#include <vector>

#include "cpu/rms_norm.h"
#include "cuda/rms_norm.h"
#include "cuda_on_cpu/activations.h"

using namespace qlora_native;

namespace {

constexpr float kEps = 1e-5f;

template <typename T>
void check_size(int64_t rows, int64_t width, size_t offset = 0) {
  oracle::Random random(1);
  const std::vector<T> x = oracle::uniform_values<T>(random, rows * width, 3.0f);
  const std::vector<T> weight = oracle::uniform_values<T>(random, width, 2.0f);
  const std::vector<T> grad_y = oracle::uniform_values<T>(random, rows * width);
  std::vector<T> y(x.size()), grad_x(x.size());
  std::vector<float> rstd(static_cast<size_t>(rows));
  cpu::rms_norm({x.data(), weight.data(), width, kEps, y.data(), rstd.data()}, rows, cuemu::kDtype<T>);
  cpu::rms_norm_backward({grad_y.data(), x.data(), weight.data(), rstd.data(), width, grad_x.data()}, rows,
                         cuemu::kDtype<T>);
  const cuemu::DeviceBuffer<T> d_x(x, offset), d_weight(weight), d_grad_y(grad_y);
  cuemu::DeviceBuffer<T> out(x.size(), offset);
  cuemu::DeviceBuffer<float> d_rstd(rstd.size());
  cuemu::over_all_schedules([&](const char*) {
    out.clear(), d_rstd.clear();
    CHECK_LAUNCH(cuda::launch_rms_norm({d_x.data(), d_weight.data(), width, kEps, out.data(), d_rstd.data()}, rows,
                                       cuemu::kDtype<T>, nullptr));
    cuemu::check_same_bits("rstd", d_rstd.host(), rstd);
    cuemu::check_same_bits("y", out.host(), y);
    out.clear();
    CHECK_LAUNCH(
        cuda::launch_rms_norm_backward({d_grad_y.data(), d_x.data(), d_weight.data(), d_rstd.data(), width, out.data()},
                                       rows, cuemu::kDtype<T>, nullptr));
    cuemu::check_same_bits("grad_x", out.host(), grad_x);
  });
}

// A thread block with one row and with many, more rows than blocks take at a time, tails, and rows by elements.
template <typename T>
void check_sizes() {
  cuemu::WithDevice small(80);
  cuemu::device().num_sms = 1;
  check_size<T>(1, 1);
  check_size<T>(150, 8);
  check_size<T>(75, 128);
  check_size<T>(23, 576);
  check_size<T>(9, 4096);
  check_size<T>(5, 577);
  check_size<T>(3, 2049);
  check_size<T>(6, 1024, sizeof(T));  // one element past a vector
}

TEST(rms_norm_fp32) { check_sizes<float>(); }
TEST(rms_norm_bf16) { check_sizes<Bf16>(); }
TEST(rms_norm_fp16) { check_sizes<Fp16>(); }

// What does not fit the shared memory of an older card is read twice.
TEST(rms_norm_of_wide_rows) {
  for (const int sm : {75, 80}) {
    const cuemu::WithDevice device(sm);
    for (const int64_t width : {8192, 14336}) {
      check_size<float>(2, width);
      check_size<Bf16>(2, width);
    }
  }
}

TEST(rms_norm_of_zeros_and_of_huge_values) {
  std::vector<float> x(3 * 64, 0.0f);
  for (size_t i = 0; i < 64; ++i) {
    x[64 + i] = 3e38f;
    x[128 + i] = 1e-30f;
  }
  const std::vector<float> weight(64, 1.0f);
  std::vector<float> y(x.size()), rstd(3);
  cpu::rms_norm({x.data(), weight.data(), 64, kEps, y.data(), rstd.data()}, 3, Dtype::kFloat32);
  const cuemu::DeviceBuffer<float> d_x(x), d_weight(weight);
  cuemu::over_all_schedules([&](const char*) {
    const cuemu::DeviceBuffer<float> out(x.size()), d_rstd(3);
    CHECK_LAUNCH(cuda::launch_rms_norm({d_x.data(), d_weight.data(), 64, kEps, out.data(), d_rstd.data()}, 3,
                                       Dtype::kFloat32, nullptr));
    cuemu::check_same_bits("rstd", d_rstd.host(), rstd);
    cuemu::check_same_bits("y", out.host(), y);
  });
}

TEST(rms_norm_of_no_rows_launches_nothing) {
  cuemu::take_launches();
  CHECK_LAUNCH(cuda::launch_rms_norm({nullptr, nullptr, 8, kEps, nullptr, nullptr}, 0, Dtype::kFloat32, nullptr));
  CHECK_LAUNCH(
      cuda::launch_rms_norm_backward({nullptr, nullptr, nullptr, nullptr, 8, nullptr}, 0, Dtype::kBfloat16, nullptr));
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
