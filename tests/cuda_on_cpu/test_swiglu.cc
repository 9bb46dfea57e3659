// The shipped kernels against the CPU op, bit for bit, and the bytes they move.
#include <vector>

#include "cpu/swiglu.h"
#include "cuda/swiglu.h"
#include "cuda_on_cpu/activations.h"

using namespace qlora_native;

namespace {

template <typename T>
void check_size(int64_t numel, size_t offset = 0) {
  oracle::Random random(1);
  const std::vector<T> gate = oracle::uniform_values<T>(random, numel, 6.0f);
  const std::vector<T> up = oracle::uniform_values<T>(random, numel, 2.0f);
  const std::vector<T> grad_y = oracle::uniform_values<T>(random, numel);
  std::vector<T> y(gate.size()), grad_gate(gate.size()), grad_up(gate.size());
  cpu::swiglu({gate.data(), up.data(), y.data()}, numel, cuemu::kDtype<T>);
  cpu::swiglu_backward({grad_y.data(), gate.data(), up.data(), grad_gate.data(), grad_up.data()}, numel,
                       cuemu::kDtype<T>);
  const cuemu::DeviceBuffer<T> d_gate(gate, offset), d_up(up), d_grad_y(grad_y, offset);
  cuemu::DeviceBuffer<T> first(gate.size(), offset), second(gate.size());
  cuemu::over_all_schedules([&](const char*) {
    first.clear(), second.clear();
    CHECK_LAUNCH(cuda::launch_swiglu({d_gate.data(), d_up.data(), first.data()}, numel, cuemu::kDtype<T>, nullptr));
    cuemu::check_same_bits("y", first.host(), y);
    CHECK_LAUNCH(cuda::launch_swiglu_backward(
        {d_grad_y.data(), d_gate.data(), d_up.data(), first.data(), second.data()}, numel, cuemu::kDtype<T>, nullptr));
    cuemu::check_same_bits("grad_gate", first.host(), grad_gate);
    cuemu::check_same_bits("grad_up", second.host(), grad_up);
  });
}

template <typename T>
void check_sizes() {
  for (const int64_t numel : {1, 7, 8, 576, 2049, 14336}) {
    check_size<T>(numel);
  }
  check_size<T>(1000, sizeof(T));  // one element past a vector
}

TEST(swiglu_fp32) { check_sizes<float>(); }
TEST(swiglu_bf16) { check_sizes<Bf16>(); }
TEST(swiglu_fp16) { check_sizes<Fp16>(); }

// Every bf16 that is a number, so the exponential over its whole range; and the infinities.
TEST(swiglu_of_every_gate) {
  std::vector<Bf16> gate;
  for (uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    if ((bits & 0x7fffu) <= 0x7f80u) {
      gate.push_back(Bf16{static_cast<uint16_t>(bits)});
    }
  }
  const auto numel = static_cast<int64_t>(gate.size());
  const std::vector<Bf16> up(gate.size(), from_float<Bf16>(1.0f));
  std::vector<Bf16> y(gate.size());
  cpu::swiglu({gate.data(), up.data(), y.data()}, numel, Dtype::kBfloat16);
  const cuemu::DeviceBuffer<Bf16> d_gate(gate), d_up(up);
  cuemu::over_all_schedules([&](const char*) {
    const cuemu::DeviceBuffer<Bf16> out(gate.size());
    CHECK_LAUNCH(cuda::launch_swiglu({d_gate.data(), d_up.data(), out.data()}, numel, Dtype::kBfloat16, nullptr));
    cuemu::check_same_bits("y", out.host(), y);
  });
}

TEST(swiglu_of_nothing_launches_nothing) {
  cuemu::take_launches();
  CHECK_LAUNCH(cuda::launch_swiglu({}, 0, Dtype::kFloat32, nullptr));
  CHECK_LAUNCH(cuda::launch_swiglu_backward({}, 0, Dtype::kFloat32, nullptr));
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
