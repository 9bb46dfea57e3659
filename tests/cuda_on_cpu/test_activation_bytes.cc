// Bytes of device memory that what stands between the products of a Llama layer moves, against each input read once and
// each output written once.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <string_view>

#include "cuda/rms_norm.h"
#include "cuda/rotary.h"
#include "cuda/swiglu.h"
#include "cuda_on_cpu/activations.h"
#include "cuda_on_cpu/counters.h"

using namespace qlora_native;

namespace {

constexpr bool kCounts = std::string_view(CUEMU_BUILD) == "race";  // the other builds look for what they always do
constexpr double kMost = 1.15;                                     // times the floor
// Llama 3 8B, and few tokens, but several for each thread block.
constexpr int64_t kTokens = 32, kWidth = 4096, kHeads = 32, kKvHeads = 8, kHeadDim = 128, kHidden = 14336;

struct Moved {
  uint64_t bytes = 0;
  int64_t floor = 0;
};

Moved operator+(const Moved& a, const Moved& b) { return {a.bytes + b.bytes, a.floor + b.floor}; }

// `elements` are those of all inputs and outputs.
Moved measure(const std::string& what, int64_t elements, const std::function<cudaError_t()>& launch) {
  Moved moved{0, elements * static_cast<int64_t>(sizeof(Bf16))};
  cuemu::over_all_schedules([&](const char*) {
    cuemu::global_bytes() = {.counts = true, .read = 0, .written = 0};
    CHECK_LAUNCH(launch());
    moved.bytes = std::max(moved.bytes, cuemu::global_bytes().read + cuemu::global_bytes().written);
    cuemu::global_bytes() = {};
  });
  CHECK(!kCounts || static_cast<double>(moved.bytes) >= static_cast<double>(moved.floor), "%s: accesses were missed",
        what.c_str());
  CHECK(static_cast<double>(moved.bytes) <= kMost * static_cast<double>(moved.floor),
        "%s: %llu bytes, %.2f times the floor", what.c_str(), static_cast<unsigned long long>(moved.bytes),
        static_cast<double>(moved.bytes) / static_cast<double>(moved.floor));
  return moved;
}

cudaError_t rotate(const Bf16* x, int64_t heads, const Bf16* angles, bool inverse, Bf16* y) {
  const int64_t row = heads * kHeadDim;
  return cuda::launch_rotary({x,
                              {kTokens * row, kHeadDim, row},
                              angles,
                              angles + kTokens * kHeadDim,
                              0,
                              1,
                              heads,
                              kTokens,
                              kHeadDim,
                              inverse,
                              y,
                              {kTokens * row, kHeadDim, row}},
                             Dtype::kBfloat16, nullptr);
}

TEST(bytes_of_a_llama_layer) {
  const cuemu::WithDevice small(80);
  cuemu::device().num_sms = 1;
  oracle::Random random(1);
  const auto rows = [&](int64_t width) {
    return cuemu::DeviceBuffer<Bf16>(oracle::uniform_values<Bf16>(random, kTokens * width));
  };
  const auto x = rows(kWidth), grad = rows(kWidth), q = rows(kHeads * kHeadDim), k = rows(kKvHeads * kHeadDim);
  const auto gate = rows(kHidden), up = rows(kHidden), grad_hidden = rows(kHidden), angles = rows(2 * kHeadDim);
  const cuemu::DeviceBuffer<Bf16> weight(oracle::uniform_values<Bf16>(random, kWidth));
  const cuemu::DeviceBuffer<Bf16> out(kTokens * kHidden), second(kTokens * kHidden);
  const cuemu::DeviceBuffer<float> rstd(kTokens);
  constexpr Dtype kType = Dtype::kBfloat16;
  const Moved norm = measure("rms_norm", kTokens * (2 * kWidth + 2) + kWidth, [&] {
    return cuda::launch_rms_norm({x.data(), weight.data(), kWidth, 1e-5f, out.data(), rstd.data()}, kTokens, kType,
                                 nullptr);
  });
  const Moved norm_grad = measure("rms_norm_backward", kTokens * (3 * kWidth + 2) + kWidth, [&] {
    return cuda::launch_rms_norm_backward({grad.data(), x.data(), weight.data(), rstd.data(), kWidth, out.data()},
                                          kTokens, kType, nullptr);
  });
  const Moved gated = measure("swiglu", 3 * kTokens * kHidden, [&] {
    return cuda::launch_swiglu({gate.data(), up.data(), out.data()}, kTokens * kHidden, kType, nullptr);
  });
  const Moved gated_grad = measure("swiglu_backward", 5 * kTokens * kHidden, [&] {
    return cuda::launch_swiglu_backward({grad_hidden.data(), gate.data(), up.data(), out.data(), second.data()},
                                        kTokens * kHidden, kType, nullptr);
  });
  Moved rotated;
  for (const bool inverse : {false, true}) {
    rotated = measure("rotary of q", kTokens * kHeadDim * (2 * kHeads + 2),
                      [&] { return rotate(q.data(), kHeads, angles.data(), inverse, out.data()); }) +
              measure("rotary of k", kTokens * kHeadDim * (2 * kKvHeads + 2),
                      [&] { return rotate(k.data(), kKvHeads, angles.data(), inverse, out.data()); });
  }
  // Two residual additions, which are torch's, read two tensors and write one; their gradient, too, is one addition.
  constexpr int64_t kResidualBytes = 2 * 3 * kTokens * kWidth * static_cast<int64_t>(sizeof(Bf16));
  const Moved residuals{kResidualBytes, kResidualBytes};
  const Moved forward = norm + norm + rotated + gated + residuals;
  const Moved backward = norm_grad + norm_grad + rotated + gated_grad + residuals;
  for (const Moved& pass : {forward, backward}) {
    const double ratio = static_cast<double>(pass.bytes) / static_cast<double>(pass.floor);
    std::printf("  %.3f times the floor\n", ratio);
    CHECK(ratio <= kMost, "a layer moves %.2f times the floor", ratio);
  }
}

}  // namespace
