// The shipped kernel against the CPU op, bit for bit.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpp/oracle.h"
#include "cpu/dequantize_4bit.h"
#include "cuda/dequantize_4bit.h"
#include "cuda_on_cpu/device_weight.h"
#include "cuda_on_cpu/launch.h"

using namespace qlora_native;

namespace {

template <typename T>
void check_same_bits(const oracle::RandomWeight& weight, size_t packed_offset, size_t out_offset, const char* what) {
  const WeightView& host = weight.view;
  const auto numel = static_cast<size_t>(host.numel);
  std::vector<T> expected(numel);
  cpu::dequantize_4bit(host, {host.numel, 0, 1, 0, host.numel}, oracle::Storage<T>::kDtype, expected.data());
  const cuemu::DeviceWeight on_device(host, packed_offset);
  cuemu::DeviceBuffer<T> out(numel, out_offset);
  CHECK_LAUNCH(cuda::launch_dequantize_4bit(on_device.view(), oracle::Storage<T>::kDtype, out.data(), nullptr));
  const std::vector<T> got = out.host();
  for (size_t i = 0; i < numel; ++i) {
    CHECK(oracle::bits_of(got[i]) == oracle::bits_of(expected[i]), "%s: element %zu is %#x, expected %#x", what, i,
          oracle::bits_of(got[i]), oracle::bits_of(expected[i]));
  }
}

template <typename T>
void check_sizes() {
  for (const bool nested : {false, true}) {
    for (const QuantType type : {QuantType::kNf4, QuantType::kFp4}) {
      for (const int64_t numel : {1, 31, 32, 33, 65, 4097, 3 * 256 * 32 + 7}) {
        for (const int64_t block : {32, 64, 4096}) {
          const oracle::RandomWeight weight(numel, block, nested, type, static_cast<uint64_t>(numel + block));
          const std::string what = "numel " + std::to_string(numel) + ", block " + std::to_string(block);
          cuemu::over_all_schedules([&](const char*) { check_same_bits<T>(weight, 0, 0, what.c_str()); });
        }
      }
    }
  }
}

TEST(dequantize_fp32_of_every_size) { check_sizes<float>(); }
TEST(dequantize_bf16_of_every_size) { check_sizes<Bf16>(); }
TEST(dequantize_fp16_of_every_size) { check_sizes<Fp16>(); }

template <typename T>
void check_unaligned() {
  const oracle::RandomWeight weight(1000, 64, true, QuantType::kNf4, 3);
  cuemu::over_all_schedules([&](const char*) {
    check_same_bits<T>(weight, 1, 0, "packed one byte past a vector");
    check_same_bits<T>(weight, 0, sizeof(T), "out one element past a vector");
    check_same_bits<T>(weight, 15, 16 - sizeof(T), "both at the end of a vector");
  });
}

TEST(dequantize_unaligned) {
  check_unaligned<float>();
  check_unaligned<Bf16>();
  check_unaligned<Fp16>();
}

// Blocks that begin at words, between words, and at odd bytes; whole tiles and parts of one.
template <typename T>
void check_gguf() {
  for (const QuantType type : oracle::kGgufTypes) {
    for (const int64_t numel : {256, 1024 + 512, 9 * 1024}) {
      const oracle::RandomWeight weight(numel, oracle::block_of(type), false, type, static_cast<uint64_t>(numel));
      const std::string what = std::string(kBlockFormats[static_cast<int>(type)].name) + ", " + std::to_string(numel);
      cuemu::over_all_schedules([&](const char*) {
        check_same_bits<T>(weight, 0, 0, what.c_str());
        check_same_bits<T>(weight, 2, 0, what.c_str());
        check_same_bits<T>(weight, 1, sizeof(T), what.c_str());
        check_same_bits<T>(weight, 1, 0, what.c_str());
      });
    }
  }
}

TEST(dequantize_gguf_fp32) { check_gguf<float>(); }
TEST(dequantize_gguf_bf16) { check_gguf<Bf16>(); }
TEST(dequantize_gguf_fp16) { check_gguf<Fp16>(); }

// Panels: their first element lies at the start of a run, of a word, of a byte, or in the middle of one.
template <typename T>
void check_ranges() {
  const oracle::RandomWeight weight(20000, 64, true, QuantType::kNf4, 6);
  std::vector<T> whole(20000);
  cpu::dequantize_4bit(weight.view, {20000, 0, 1, 0, 20000}, oracle::Storage<T>::kDtype, whole.data());
  const cuemu::DeviceWeight on_device(weight.view);
  cuemu::over_all_schedules([&](const char* schedule) {
    for (const int64_t first : {0, 32, 4096, 9608, 10002, 10003, 19999}) {
      for (const int64_t count : {1, 33, 9997}) {
        const int64_t taken = std::min<int64_t>(count, 20000 - first);
        cuemu::DeviceBuffer<T> out(static_cast<size_t>(taken));
        CHECK_LAUNCH(cuda::launch_dequantize_4bit(on_device.view(), {1, first, first + taken, 0, 1},
                                                  oracle::Storage<T>::kDtype, out.data(), nullptr));
        const std::vector<T> got = out.host();
        for (size_t i = 0; i < got.size(); ++i) {
          CHECK(oracle::bits_of(got[i]) == oracle::bits_of(whole[static_cast<size_t>(first) + i]),
                "%s: element %zu of those from %ld on", schedule, i, static_cast<long>(first));
        }
      }
    }
  });
}

TEST(dequantize_ranges) {
  check_ranges<float>();
  check_ranges<Bf16>();
  check_ranges<Fp16>();
}

// Rectangles: of columns that allow vectors, that end within a tile, and that begin within a byte.
template <typename T>
void check_panels(int64_t row_length, const std::vector<std::pair<int64_t, int64_t>>& columns,
                  QuantType type = QuantType::kNf4) {
  constexpr int64_t kRows = 5;
  const int64_t block = is_gguf(type) ? oracle::block_of(type) : 64;
  const oracle::RandomWeight weight(kRows * row_length, block, !is_gguf(type), type, 8);
  const cuemu::DeviceWeight on_device(weight.view);
  cuemu::over_all_schedules([&](const char* schedule) {
    for (const auto& [begin, end] : columns) {
      for (const int64_t first_row : {0, 2}) {
        const Panel panel{row_length, first_row, kRows, begin, end};
        std::vector<T> expected(static_cast<size_t>(panel.rows() * panel.columns()));
        cpu::dequantize_4bit(weight.view, panel, oracle::Storage<T>::kDtype, expected.data());
        cuemu::DeviceBuffer<T> out(expected.size());
        CHECK_LAUNCH(
            cuda::launch_dequantize_4bit(on_device.view(), panel, oracle::Storage<T>::kDtype, out.data(), nullptr));
        const std::vector<T> got = out.host();
        for (size_t i = 0; i < got.size(); ++i) {
          CHECK(oracle::bits_of(got[i]) == oracle::bits_of(expected[i]), "%s: element %zu of columns %ld to %ld",
                schedule, i, static_cast<long>(begin), static_cast<long>(end));
        }
      }
    }
  });
}

TEST(dequantize_panels) {
  const std::vector<std::pair<int64_t, int64_t>> whole_tiles{{0, 1024}, {1024, 3072}, {64, 1000}, {3, 2050}, {7, 8}};
  check_panels<float>(4096, whole_tiles);
  check_panels<Bf16>(4096, whole_tiles);
  check_panels<Fp16>(2051, {{0, 1024}, {0, 2051}, {1025, 2051}});
}

TEST(dequantize_gguf_panels) {
  const std::vector<std::pair<int64_t, int64_t>> columns{{0, 1024}, {1024, 2048}, {32, 1184}, {3, 2050}, {7, 8}};
  check_panels<float>(2080, columns, QuantType::kQ4_0);  // an odd number of blocks a row
  check_panels<Bf16>(2080, columns, QuantType::kQ8_0);
  check_panels<Fp16>(2304, columns, QuantType::kQ6_K);
}

TEST(dequantize_launches_once_on_its_stream) {
  const oracle::RandomWeight weight(5000, 64, true, QuantType::kNf4, 4);
  const cuemu::DeviceWeight on_device(weight.view);
  cuemu::DeviceBuffer<float> out(5000);
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess, "a stream");
  cuemu::take_launches();
  CHECK_LAUNCH(cuda::launch_dequantize_4bit(on_device.view(), Dtype::kFloat32, out.data(), stream));
  const std::vector<cuemu::Launch> launches = cuemu::take_launches();
  CHECK(launches.size() == 1 && launches[0].stream == stream && launches[0].block.x == 256 && launches[0].grid.x == 1,
        "%zu launches", launches.size());
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "the stream");
}

TEST(dequantize_of_nothing_launches_nothing) {
  const oracle::RandomWeight weight(0, 64, false, QuantType::kNf4, 5);
  cuemu::take_launches();
  CHECK_LAUNCH(cuda::launch_dequantize_4bit(weight.view, Dtype::kFloat32, nullptr, nullptr));
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
