// Which register of which lane holds which element: mma.sync and ldmatrix against the tables that CuTe publishes for
// these instructions (mma_traits_sm75.hpp, mma_traits_sm80.hpp), as shapes and strides. An emulator with a wrong layout
// that agrees with itself would pass every product; here each position is tried alone.
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/wp.cuh"
#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/harness.h"

using namespace qlora_native;

namespace {

// Lane l = l0 + 4 l1 and value v = v0 + 2 v1 + 4 v2 lie at the sum of their digits times strides.
struct Layout {
  int lane_strides[2];
  int value_strides[3];

  int operator()(int lane, int value) const {
    return lane % 4 * lane_strides[0] + lane / 4 * lane_strides[1] + value % 2 * value_strides[0] +
           value / 2 % 2 * value_strides[1] + value / 4 * value_strides[2];
  }
};

// Offsets are m + 16 k for a, n + 8 k for b and m + 16 n for d.
constexpr Layout kA16{{32, 1}, {16, 8, 128}};
constexpr Layout kB16{{16, 1}, {8, 64, 0}};
constexpr Layout kA8{{32, 1}, {16, 8, 0}};
constexpr Layout kB8{{16, 1}, {8, 0, 0}};
constexpr Layout kD{{32, 1}, {16, 8, 0}};

constexpr int kBatch = 8;  // products a launch

// Each lane's registers as they come, `a_words` and `b_words` of them.
template <typename T, int kAWords>
__global__ void multiply_fragments(const uint32_t* a,  // [batch, 32, kAWords]
                                   const uint32_t* b,  // [batch, 32, kAWords / 2]
                                   float* d) {         // [batch, 32, 4], added to
  const size_t lane = size_t{blockIdx.x} * 32 + threadIdx.x;
  uint32_t a_words[kAWords];
  uint32_t b_words[kAWords / 2];
  float sums[4];
  for (size_t i = 0; i < kAWords; ++i) {
    a_words[i] = a[lane * kAWords + i];
  }
  for (size_t i = 0; i < kAWords / 2; ++i) {
    b_words[i] = b[lane * kAWords / 2 + i];
  }
  for (size_t i = 0; i < 4; ++i) {
    sums[i] = d[lane * 4 + i];
  }
  if constexpr (kAWords == 4) {
    wp::mma_m16n8k16<T>(sums, a_words, b_words);
  } else {
    wp::mma_m16n8k8_fp16(sums, a_words, b_words[0]);
  }
  for (size_t i = 0; i < 4; ++i) {
    d[lane * 4 + i] = sums[i];
  }
}

// A matrix of small integers as the words of all lanes, by the table.
template <typename T>
std::vector<uint32_t> fragment_of(const std::vector<float>& matrix, const Layout& layout, int words) {
  std::vector<uint32_t> registers(static_cast<size_t>(32 * words));
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < 2 * words; ++value) {
      const uint32_t bits = from_float<T>(matrix[static_cast<size_t>(layout(lane, value))]).bits;
      registers[static_cast<size_t>(lane * words + value / 2)] |= bits << (value % 2 * 16);
    }
  }
  return registers;
}

// One 1 at every position of a in turn; b holds a different number at every position, d begins with others.
template <typename T, int kAWords>
void check_one_hot(const Layout& a_layout, const Layout& b_layout) {
  constexpr int kDepth = kAWords * 4;
  std::vector<float> b_matrix(8 * kDepth);
  for (size_t i = 0; i < b_matrix.size(); ++i) {
    b_matrix[i] = static_cast<float>(i + 1);  // up to 128: exact in bf16
  }
  const std::vector<uint32_t> b_one = fragment_of<T>(b_matrix, b_layout, kAWords / 2);
  for (int first = 0; first < 16 * kDepth; first += kBatch) {
    std::vector<uint32_t> a;
    std::vector<uint32_t> b;
    for (int position = first; position < first + kBatch; ++position) {
      std::vector<float> a_matrix(16 * kDepth);
      a_matrix[static_cast<size_t>(position)] = 1.0f;
      const std::vector<uint32_t> words = fragment_of<T>(a_matrix, a_layout, kAWords);
      a.insert(a.end(), words.begin(), words.end());
      b.insert(b.end(), b_one.begin(), b_one.end());
    }
    const cuemu::DeviceBuffer<uint32_t> device_a(a);
    const cuemu::DeviceBuffer<uint32_t> device_b(b);
    const cuemu::DeviceBuffer<float> device_d(std::vector<float>(kBatch * 128, 1000.0f));
    CHECK_LAUNCH(wp::launch(multiply_fragments<T, kAWords>, dim3(kBatch), dim3(32), 0, nullptr, device_a.data(),
                            device_b.data(), device_d.data()));
    const std::vector<float> d = device_d.host();
    for (int i = 0; i < kBatch * 128; ++i) {
      const int position = first + i / 128;
      const int place = kD(i % 128 / 4, i % 4);
      const bool in_row = place % 16 == position % 16;
      const float product = in_row ? b_matrix[static_cast<size_t>(place / 16 + position / 16 * 8)] : 0.0f;
      CHECK(d[static_cast<size_t>(i)] == 1000.0f + product, "a[%d, %d], d[%d, %d]: %g, expected %g", position % 16,
            position / 16, place % 16, place / 16, static_cast<double>(d[static_cast<size_t>(i)]),
            static_cast<double>(1000.0f + product));
    }
  }
}

TEST(fragments_of_m16n8k16_bf16) {
  cuemu::over_all_schedules([](const char*) { check_one_hot<Bf16, 4>(kA16, kB16); });
}
TEST(fragments_of_m16n8k16_fp16) {
  cuemu::over_all_schedules([](const char*) { check_one_hot<Fp16, 4>(kA16, kB16); });
}
TEST(fragments_of_m16n8k8_fp16) {
  cuemu::over_all_schedules([](const char*) { check_one_hot<Fp16, 2>(kA8, kB8); });
}

TEST(fragments_on_sm_75) {
  const cuemu::WithDevice turing(75);
  check_one_hot<Fp16, 4>(kA16, kB16);
  check_one_hot<Fp16, 2>(kA8, kB8);
}

TEST(every_layout_names_every_position_once) {
  const auto check = [](const Layout& layout, int values, int size, const char* what) {
    std::vector<int> named(static_cast<size_t>(size));
    for (int i = 0; i < 32 * values; ++i) {
      ++named[static_cast<size_t>(layout(i / values, i % values))];
    }
    for (const int count : named) {
      CHECK(count == 1, "%s", what);
    }
  };
  check(kA16, 8, 256, "a of k16");
  check(kB16, 4, 128, "b of k16");
  check(kA8, 4, 128, "a of k8");
  check(kB8, 2, 64, "b of k8");
  check(kD, 4, 128, "d");
}

// Words of every lane after ldmatrix; lane i gives the address of row i.
template <bool kTrans>
__global__ void load_fragments(const uint16_t* elements,  // [32, 8]
                               uint32_t* out) {           // [32, 4]
  WP_SHARED(uint4, rows, 32);
  const size_t lane = threadIdx.x;
  rows[lane] = wp::load_16(elements + lane * 8);
  __syncthreads();
  uint32_t words[4];
  const void* const row = &rows[lane];
  if constexpr (kTrans) {
    wp::ldmatrix_x4_trans(words, row);
  } else {
    wp::ldmatrix_x4(words, row);
  }
  for (size_t i = 0; i < 4; ++i) {
    out[lane * 4 + i] = words[i];
  }
}

// copy_traits_sm75.hpp: plain, value v of lane l of a matrix is element 2 l + v in row-major order; transposed, lane
// l0 + 4 l1 holds rows 2 l0 and 2 l0 + 1 of column l1.
template <bool kTrans>
void check_ldmatrix() {
  std::vector<uint16_t> elements(32 * 8);
  for (size_t i = 0; i < elements.size(); ++i) {
    elements[i] = static_cast<uint16_t>(0x100 + i);
  }
  const cuemu::DeviceBuffer<uint16_t> in(elements);
  cuemu::over_all_schedules([&](const char* schedule) {
    const cuemu::DeviceBuffer<uint32_t> out(32 * 4);
    cuemu::counters() = {};
    CHECK_LAUNCH((wp::launch(load_fragments<kTrans>, dim3(1), dim3(32), 0, nullptr, in.data(), out.data())));
    CHECK(cuemu::counters().ldmatrix == 4 && cuemu::counters().ldmatrix_wavefronts == 4,
          "rows one after the other have no bank conflict");
    const std::vector<uint32_t> words = out.host();
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int value = 0; value < 2; ++value) {
          const int plain = 2 * lane + value;
          const int across = (2 * (lane % 4) + value) * 8 + lane / 4;
          const uint32_t expected = elements[static_cast<size_t>(matrix * 64 + (kTrans ? across : plain))];
          const uint32_t got = words[static_cast<size_t>(lane * 4 + matrix)] >> (16 * value) & 0xffffu;
          CHECK(got == expected, "%s: lane %d, matrix %d, value %d: %#x, expected %#x", schedule, lane, matrix, value,
                got, expected);
        }
      }
    }
  });
}

TEST(ldmatrix_x4_gives_every_element) { check_ldmatrix<false>(); }
TEST(ldmatrix_x4_trans_gives_every_element) { check_ldmatrix<true>(); }

// Rows 128 bytes apart all lie in the same four banks; 144 bytes apart they lie in different ones.
template <int kStride>
__global__ void load_strided(uint32_t* out) {  // [32]
  uint4* rows = wp::dyn_smem<uint4>();
  for (unsigned i = threadIdx.x; i < 32 * kStride; i += 32) {
    rows[i] = make_uint4(i, i, i, i);
  }
  __syncthreads();
  uint32_t words[4];
  wp::ldmatrix_x4(words, rows + threadIdx.x * kStride);
  out[threadIdx.x] = words[0] + words[1] + words[2] + words[3];
}

TEST(bank_conflicts_are_counted) {
  const cuemu::DeviceBuffer<uint32_t> out(32);
  cuemu::counters() = {};
  CHECK_LAUNCH(wp::launch(load_strided<8>, dim3(1), dim3(32), 32 * 8 * 16, nullptr, out.data()));
  CHECK(cuemu::counters().ldmatrix_wavefronts == 32, "%d", static_cast<int>(cuemu::counters().ldmatrix_wavefronts));
  cuemu::counters() = {};
  CHECK_LAUNCH(wp::launch(load_strided<9>, dim3(1), dim3(32), 32 * 9 * 16, nullptr, out.data()));
  CHECK(cuemu::counters().ldmatrix_wavefronts == 4, "%d", static_cast<int>(cuemu::counters().ldmatrix_wavefronts));
}

// Sums of products in the order of k, each step rounded to fp32.
TEST(products_add_up_in_order) {
  std::vector<float> a(256);
  std::vector<float> b(128);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = to_float(from_float<Bf16>(0.37f * static_cast<float>(i % 13) - 2.0f));
  }
  for (size_t i = 0; i < b.size(); ++i) {
    b[i] = to_float(from_float<Bf16>(1.9f - 0.21f * static_cast<float>(i % 17)));
  }
  const cuemu::DeviceBuffer<uint32_t> device_a(fragment_of<Bf16>(a, kA16, 4));
  const cuemu::DeviceBuffer<uint32_t> device_b(fragment_of<Bf16>(b, kB16, 2));
  cuemu::over_all_schedules([&](const char*) {
    const cuemu::DeviceBuffer<float> device_d(std::vector<float>(128, 0.125f));
    CHECK_LAUNCH(wp::launch(multiply_fragments<Bf16, 4>, dim3(1), dim3(32), 0, nullptr, device_a.data(),
                            device_b.data(), device_d.data()));
    const std::vector<float> d = device_d.host();
    for (int i = 0; i < 128; ++i) {
      const int place = kD(i / 4, i % 4);
      float expected = 0.125f;
      for (int k = 0; k < 16; ++k) {
        expected += a[static_cast<size_t>(place % 16 + 16 * k)] * b[static_cast<size_t>(place / 16 + 8 * k)];
      }
      CHECK(d[static_cast<size_t>(i)] == expected, "d[%d, %d]", place % 16, place / 16);
    }
  });
}

}  // namespace
