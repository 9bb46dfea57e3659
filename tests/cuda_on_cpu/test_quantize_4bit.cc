// The shipped kernels against the CPU ops, byte for byte.
#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/layout.h"
#include "cpp/oracle.h"
#include "cpu/quantize_4bit.h"
#include "cuda/quantize_4bit.cuh"
#include "cuda/quantize_4bit.h"
#include "cuda_on_cpu/harness.h"
#include "cuda_on_cpu/launch.h"

using namespace qlora_native;

namespace {

constexpr QuantType kTypes[2] = {QuantType::kNf4, QuantType::kFp4};
constexpr int64_t kBlockSizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};

struct Quantized {
  Quantized(int64_t numel, int64_t block_size)
      : packed(static_cast<size_t>(packed_bytes(numel))), absmax(static_cast<size_t>(num_blocks(numel, block_size))) {}

  std::vector<uint8_t> packed;
  std::vector<float> absmax;
  int64_t bad = -2;
};

// Stretches of 50 elements, so that blocks of every size hold several: plain values, zeros of both signs, magnitudes
// whose reciprocal overflows, subnormals of T, decision points, any finite values.
template <typename T>
std::vector<T> values(int64_t numel, uint64_t seed) {
  oracle::Random random(seed);
  std::vector<T> x;
  for (int64_t i = 0; i < numel; ++i) {
    float v = random.uniform();
    switch (i / 50 % 7) {
      case 1:
        v = v < 0.0f ? -0.0f : 0.0f;
        break;
      case 2:
        v *= 0x1p-130f;
        break;
      case 3:
        v *= 0x1p-23f;
        break;
      case 4:
        v = i % 50 == 0 ? 1.0f : nf4_boundaries().value[i % 15];
        break;
      case 5:
        v = i % 50 == 0 ? -1.0f : (i % 2 == 0 ? -1.0f : 1.0f) * fp4_pivots().value[i % 7];
        break;
      case 6:
        v = sizeof(T) == sizeof(float) ? random.any_finite() : v * 60000.0f;
        break;
      default:
        break;
    }
    x.push_back(from_float<T>(v));
  }
  return x;
}

template <typename T>
Quantized on_cpu(const std::vector<T>& x, int64_t block_size, QuantType type) {
  const auto numel = static_cast<int64_t>(x.size());
  Quantized result(numel, block_size);
  result.bad = cpu::quantize_4bit(x.data(), oracle::Storage<T>::kDtype, numel, block_size, type, result.packed.data(),
                                  result.absmax.data());
  return result;
}

// grid: thread blocks, of which the kernel is then launched directly; 0: by the launcher.
template <typename T>
Quantized on_device(const std::vector<T>& x, int64_t block_size, QuantType type, size_t x_offset = 0,
                    size_t packed_offset = 0, unsigned grid = 0) {
  const auto numel = static_cast<int64_t>(x.size());
  Quantized result(numel, block_size);
  const cuemu::DeviceBuffer<T> in(x, x_offset);
  const cuemu::DeviceBuffer<uint8_t> packed(result.packed.size(), packed_offset);
  const cuemu::DeviceBuffer<float> absmax(result.absmax.size());
  const cuemu::DeviceBuffer<int64_t> bad(1);
  if (grid == 0) {
    CHECK_LAUNCH(cuda::launch_quantize_4bit(in.data(), oracle::Storage<T>::kDtype, numel, block_size, type,
                                            packed.data(), absmax.data(), bad.data(), nullptr));
  } else {
    const auto kernel = type == QuantType::kNf4 ? cuda::quantize_4bit_kernel<T, QuantType::kNf4>
                                                : cuda::quantize_4bit_kernel<T, QuantType::kFp4>;
    CHECK_LAUNCH(wp::launch(kernel, dim3(grid), dim3(cuda::kQuantizeThreads), 0, nullptr, in.data(), numel,
                            std::countr_zero(static_cast<uint64_t>(block_size)), true, packed.data(), absmax.data(),
                            reinterpret_cast<unsigned long long*>(bad.data())));
  }
  result.packed = packed.host();
  result.absmax = absmax.host();
  result.bad = bad.host()[0];
  return result;
}

void check_same(const Quantized& got, const Quantized& expected, const char* what) {
  CHECK(got.bad == expected.bad, "%s: %lld, expected %lld", what, static_cast<long long>(got.bad),
        static_cast<long long>(expected.bad));
  for (size_t i = 0; i < expected.absmax.size(); ++i) {
    CHECK(oracle::bits_of(got.absmax[i]) == oracle::bits_of(expected.absmax[i]), "%s: scale %zu is %#x, expected %#x",
          what, i, oracle::bits_of(got.absmax[i]), oracle::bits_of(expected.absmax[i]));
  }
  for (size_t i = 0; i < expected.packed.size(); ++i) {
    CHECK(got.packed[i] == expected.packed[i], "%s: byte %zu is %#x, expected %#x", what, i, got.packed[i],
          expected.packed[i]);
  }
}

template <typename T>
void check_sizes() {
  for (const int64_t numel : {1, 33, 2047, 4096, 2 * 4096 + 300}) {
    const std::vector<T> x = values<T>(numel, static_cast<uint64_t>(numel));
    for (const int64_t block_size : kBlockSizes) {
      for (const QuantType type : kTypes) {
        const Quantized expected = on_cpu(x, block_size, type);
        CHECK(expected.bad == -1, "an input that is not finite");
        const std::string what = "numel " + std::to_string(numel) + ", block " + std::to_string(block_size) +
                                 ", type " + std::to_string(static_cast<int>(type));
        cuemu::over_all_schedules(
            [&](const char*) { check_same(on_device(x, block_size, type), expected, what.c_str()); });
      }
    }
  }
}

TEST(quantize_fp32_of_every_size) { check_sizes<float>(); }
TEST(quantize_bf16_of_every_size) { check_sizes<Bf16>(); }
TEST(quantize_fp16_of_every_size) { check_sizes<Fp16>(); }

TEST(quantize_a_grid_that_strides) {
  const std::vector<Bf16> x = values<Bf16>(5 * 4096 + 100, 1);
  for (const int64_t block_size : {64, 512, 4096}) {
    const Quantized expected = on_cpu(x, block_size, QuantType::kNf4);
    cuemu::over_all_schedules([&](const char*) {
      Quantized got = on_device(x, block_size, QuantType::kNf4, 0, 0, 2);
      check_same(got, expected, "two thread blocks");
    });
  }
}

template <typename T>
void check_unaligned() {
  const std::vector<T> x = values<T>(5000, 2);
  const Quantized expected = on_cpu(x, 512, QuantType::kFp4);
  cuemu::over_all_schedules([&](const char*) {
    check_same(on_device(x, 512, QuantType::kFp4, sizeof(T), 0), expected, "x one element past a vector");
    check_same(on_device(x, 512, QuantType::kFp4, 0, 1), expected, "packed one byte past a vector");
    check_same(on_device(x, 512, QuantType::kFp4, 16 - sizeof(T), 15), expected, "both at the end of a vector");
  });
}

TEST(quantize_unaligned) {
  check_unaligned<float>();
  check_unaligned<Bf16>();
  check_unaligned<Fp16>();
}

// Every bit pattern of the 16-bit formats, and floats around all decision points, against blocks of many scales.
TEST(quantize_decides_as_the_cpu) {
  std::vector<Bf16> all;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const bool finite = (bits & 0x7f80u) != 0x7f80u;
    all.push_back(Bf16{static_cast<uint16_t>(finite ? bits : 0)});
  }
  std::vector<float> near;
  for (const float scale : {1.0f, 3.0f, 0.7f, 0x1p-127f}) {
    const auto add = [&](float v) {
      if (near.size() % 32 == 0) {
        near.push_back(scale);  // the block's largest
      }
      near.push_back(v);
    };
    for (int i = 0; i < 15; ++i) {
      for (const float point : {nf4_boundaries().value[i] * scale, fp4_pivots().value[i % 7] * scale}) {
        for (const float v : {point, std::nextafter(point, 2.0f), std::nextafter(point, -2.0f)}) {
          add(v);
          add(-v);
        }
      }
    }
    while (near.size() % 32 != 0) {
      add(0.0f);
    }
  }
  for (const QuantType type : kTypes) {
    check_same(on_device(all, 64, type), on_cpu(all, 64, type), "all of bf16");
    check_same(on_device(near, 32, type), on_cpu(near, 32, type), "decision points");
  }
}

template <typename T>
void check_bad(float value) {
  for (const int64_t block_size : {32, 256, 4096}) {
    for (const std::vector<size_t>& where :
         {std::vector<size_t>{0}, {8190, 4097}, {5, 3, 700}, {9000, 8999}, {255, 256, 9000}, {7}}) {
      std::vector<T> x = values<T>(9001, 3);
      for (const size_t at : where) {
        x[at] = from_float<T>(value);
      }
      const int64_t expected = on_cpu(x, block_size, QuantType::kNf4).bad;
      CHECK(expected >= 0, "the CPU found nothing");
      cuemu::over_all_schedules([&](const char*) {
        const int64_t got = on_device(x, block_size, QuantType::kNf4).bad;
        CHECK(got == expected, "%lld, expected %lld", static_cast<long long>(got), static_cast<long long>(expected));
      });
    }
  }
}

TEST(quantize_names_the_lowest_bad_index) {
  check_bad<float>(std::numeric_limits<float>::infinity());
  check_bad<Bf16>(std::numeric_limits<float>::quiet_NaN());
  check_bad<Fp16>(-std::numeric_limits<float>::infinity());
}

TEST(quantize_nothing) {
  const cuemu::DeviceBuffer<int64_t> bad(std::vector<int64_t>{5});
  cuemu::take_launches();
  CHECK_LAUNCH(cuda::launch_quantize_4bit(nullptr, Dtype::kFloat32, 0, 64, QuantType::kNf4, nullptr, nullptr,
                                          bad.data(), nullptr));
  CHECK(bad.host()[0] == -1 && cuemu::take_launches().empty(), "%lld", static_cast<long long>(bad.host()[0]));
}

// ---------------------------------------------------------------------------------------------------------------------
// Double quantization

struct Scales {
  explicit Scales(size_t blocks) : codes(blocks), nested_absmax((blocks + 255) / 256) {}

  std::vector<uint8_t> codes;
  std::vector<float> nested_absmax;
  float offset = -1.0f;
};

Scales scales_on_cpu(const std::vector<float>& absmax) {
  Scales result(absmax.size());
  cpu::quantize_scales(absmax.data(), static_cast<int64_t>(absmax.size()), result.codes.data(),
                       result.nested_absmax.data(), &result.offset);
  return result;
}

Scales scales_on_device(const std::vector<float>& absmax, unsigned grid = 0) {
  const auto blocks = static_cast<int64_t>(absmax.size());
  const int64_t groups = num_nested_blocks(blocks);
  Scales result(absmax.size());
  const cuemu::DeviceBuffer<float> in(absmax);
  const cuemu::DeviceBuffer<uint8_t> codes(result.codes.size());
  const cuemu::DeviceBuffer<float> nested_absmax(result.nested_absmax.size());
  const cuemu::DeviceBuffer<float> offset(1);
  const cuemu::DeviceBuffer<unsigned char> workspace(static_cast<size_t>(cuda::quantize_scales_workspace(blocks)));
  if (grid == 0) {
    CHECK_LAUNCH(cuda::launch_quantize_scales(in.data(), blocks, codes.data(), nested_absmax.data(), offset.data(),
                                              workspace.data(), nullptr));
  } else {
    auto* sums = reinterpret_cast<double*>(workspace.data());
    CHECK_LAUNCH(wp::launch(cuda::sum_groups_kernel<cuda::kWarpsOfSums>, dim3(grid), dim3(32 * cuda::kWarpsOfSums), 0,
                            nullptr, in.data(), blocks, groups, sums));
    CHECK_LAUNCH(wp::launch(cuda::mean_kernel<cuda::kNestedThreads>, dim3(1), dim3(cuda::kNestedThreads), 0, nullptr,
                            sums, groups, blocks, offset.data()));
    CHECK_LAUNCH(wp::launch(cuda::quantize_scales_kernel<cuda::kNestedThreads>, dim3(grid), dim3(cuda::kNestedThreads),
                            0, nullptr, in.data(), blocks, groups, offset.data(), codes.data(), nested_absmax.data()));
  }
  result.codes = codes.host();
  result.nested_absmax = nested_absmax.host();
  result.offset = offset.host()[0];
  return result;
}

void check_same(const Scales& got, const Scales& expected, const char* what) {
  CHECK(oracle::bits_of(got.offset) == oracle::bits_of(expected.offset), "%s: the offset is %a, expected %a", what,
        static_cast<double>(got.offset), static_cast<double>(expected.offset));
  for (size_t i = 0; i < expected.nested_absmax.size(); ++i) {
    CHECK(oracle::bits_of(got.nested_absmax[i]) == oracle::bits_of(expected.nested_absmax[i]),
          "%s: nested absmax %zu is %a, expected %a", what, i, static_cast<double>(got.nested_absmax[i]),
          static_cast<double>(expected.nested_absmax[i]));
  }
  for (size_t i = 0; i < expected.codes.size(); ++i) {
    CHECK(got.codes[i] == expected.codes[i], "%s: code %zu is %d, expected %d", what, i, got.codes[i],
          expected.codes[i]);
  }
}

// Magnitudes of many sizes, so that the order of the sum shows in its last bits.
std::vector<float> magnitudes(size_t count, uint64_t seed) {
  oracle::Random random(seed);
  std::vector<float> absmax;
  for (size_t i = 0; i < count; ++i) {
    const float v = std::fabs(random.uniform());
    absmax.push_back(i % 3 == 0 ? v * v * v * v : i % 700 == 5 ? 0.0f : v);
  }
  return absmax;
}

TEST(quantize_scales_of_every_size) {
  for (const size_t blocks : {size_t{1}, size_t{2}, size_t{255}, size_t{256}, size_t{257}, size_t{3000}}) {
    const std::vector<float> absmax = magnitudes(blocks, blocks);
    const Scales expected = scales_on_cpu(absmax);
    const std::string what = std::to_string(blocks) + " scales";
    cuemu::over_all_schedules([&](const char*) { check_same(scales_on_device(absmax), expected, what.c_str()); });
  }
}

TEST(quantize_scales_a_grid_that_strides) {
  const std::vector<float> absmax = magnitudes(3000, 4);
  const Scales expected = scales_on_cpu(absmax);
  cuemu::over_all_schedules(
      [&](const char*) { check_same(scales_on_device(absmax, 2), expected, "two thread blocks"); });
}

TEST(quantize_scales_of_more_groups_than_threads) {
  const std::vector<float> absmax = magnitudes(256 * 300 + 5, 5);
  check_same(scales_on_device(absmax), scales_on_cpu(absmax), "300 groups");
}

TEST(quantize_scales_that_are_special) {
  const std::vector<float> same(600, 0.37f);
  const std::vector<float> zeros(600, 0.0f);
  std::vector<float> tiny = magnitudes(600, 6);
  for (float& v : tiny) {
    v *= 0x1p-130f;
  }
  std::vector<float> huge = magnitudes(600, 7);
  for (float& v : huge) {
    v *= std::numeric_limits<float>::max();
  }
  for (const std::vector<float>& absmax : {same, zeros, tiny, huge}) {
    check_same(scales_on_device(absmax), scales_on_cpu(absmax), "special");
  }
}

TEST(quantize_scales_of_nothing) { check_same(scales_on_device({}), scales_on_cpu({}), "nothing"); }

// ---------------------------------------------------------------------------------------------------------------------

// Both launches captured once and replayed on other values: nothing waits, allocates or is remembered.
TEST(quantize_in_a_graph) {
  const int64_t numel = 64 * 1000;
  const auto size = static_cast<size_t>(numel);
  const cuemu::DeviceBuffer<Bf16> x(size);
  const cuemu::DeviceBuffer<uint8_t> packed(size / 2);
  const cuemu::DeviceBuffer<float> absmax(1000);
  const cuemu::DeviceBuffer<int64_t> bad(1);
  const cuemu::DeviceBuffer<uint8_t> codes(1000);
  const cuemu::DeviceBuffer<float> nested_absmax(4);
  const cuemu::DeviceBuffer<float> offset(1);
  const cuemu::DeviceBuffer<unsigned char> workspace(static_cast<size_t>(cuda::quantize_scales_workspace(1000)));
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess, "a stream");
  cuemu::take_launches();
  CHECK_LAUNCH(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK_LAUNCH(cuda::launch_quantize_4bit(x.data(), Dtype::kBfloat16, numel, 64, QuantType::kNf4, packed.data(),
                                          absmax.data(), bad.data(), stream));
  CHECK_LAUNCH(cuda::launch_quantize_scales(absmax.data(), 1000, codes.data(), nested_absmax.data(), offset.data(),
                                            workspace.data(), stream));
  CHECK_LAUNCH(cudaStreamEndCapture(stream, &graph));
  CHECK_LAUNCH(cudaGraphInstantiate(&executable, graph, 0));
  for (const uint64_t seed : {uint64_t{8}, uint64_t{9}}) {
    const std::vector<Bf16> now = values<Bf16>(numel, seed);
    std::memcpy(x.data(), now.data(), size * sizeof(Bf16));
    CHECK_LAUNCH(cudaGraphLaunch(executable, stream));
    Quantized got(numel, 64);
    got.packed = packed.host();
    got.absmax = absmax.host();
    got.bad = bad.host()[0];
    check_same(got, on_cpu(now, 64, QuantType::kNf4), "replayed");
    Scales scales(1000);
    scales.codes = codes.host();
    scales.nested_absmax = nested_absmax.host();
    scales.offset = offset.host()[0];
    check_same(scales, scales_on_cpu(got.absmax), "replayed");
  }
  for (const cuemu::Launch& launch : cuemu::take_launches()) {
    CHECK(launch.stream == stream, "a launch on another stream");
  }
  CHECK_LAUNCH(cudaGraphExecDestroy(executable));
  CHECK_LAUNCH(cudaGraphDestroy(graph));
  CHECK_LAUNCH(cudaStreamDestroy(stream));
}

}  // namespace
