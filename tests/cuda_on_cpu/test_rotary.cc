// The shipped kernel against the CPU op, bit for bit.
#include <vector>

#include "cpu/rotary.h"
#include "cuda/rotary.h"
#include "cuda_on_cpu/activations.h"

using namespace qlora_native;

namespace {

struct Shape {
  int64_t batches, heads, length, head_dim;
  bool own_angles = false;  // each batch has its own
  int64_t padding = 0;      // elements between heads
  size_t offset = 0;        // bytes past a multiple of 256
};

// x as a projection makes it: heads side by side, positions after each other.
template <typename T>
void check_shape(const Shape& of) {
  const int64_t per_head = of.head_dim + of.padding;
  const int64_t numel = of.batches * of.length * of.heads * per_head;
  const int64_t angles = (of.own_angles ? of.batches : 1) * of.length * of.head_dim;
  oracle::Random random(1);
  const std::vector<T> x = oracle::uniform_values<T>(random, numel, 4.0f);
  const std::vector<T> cosine = oracle::uniform_values<T>(random, angles);
  const std::vector<T> sine = oracle::uniform_values<T>(random, angles);
  const int64_t strides[3] = {of.length * of.heads * per_head, per_head, of.heads * per_head};
  const cuemu::DeviceBuffer<T> d_x(x, of.offset), d_cosine(cosine), d_sine(sine), out(x.size(), of.offset);
  for (const bool inverse : {false, true}) {
    std::vector<T> y(x.size(), T{});
    RotaryJob job{x.data(),
                  {strides[0], strides[1], strides[2]},
                  cosine.data(),
                  sine.data(),
                  of.own_angles ? of.length : 0,
                  of.batches,
                  of.heads,
                  of.length,
                  of.head_dim,
                  inverse,
                  y.data(),
                  {strides[0], strides[1], strides[2]}};
    cpu::rotary(job, cuemu::kDtype<T>);
    job.x = d_x.data(), job.cosine = d_cosine.data(), job.sine = d_sine.data(), job.y = out.data();
    cuemu::over_all_schedules([&](const char*) {
      std::memset(out.data(), 0, out.size() * sizeof(T));  // what lies between heads stays
      CHECK_LAUNCH(cuda::launch_rotary(job, cuemu::kDtype<T>, nullptr));
      cuemu::check_same_bits("y", out.host(), y);
    });
  }
}

template <typename T>
void check_shapes() {
  check_shape<T>({1, 1, 1, 2});
  check_shape<T>({2, 3, 5, 34});
  check_shape<T>({2, 33, 7, 64, true});
  check_shape<T>({3, 2, 70, 128});
  check_shape<T>({1, 17, 3, 96, false, 8});
  check_shape<T>({1, 2, 3, 64, false, 1});             // heads at odd addresses
  check_shape<T>({1, 2, 3, 64, false, 0, sizeof(T)});  // one element past a vector
  check_shape<T>({1, 1, 2, 8192});
  check_shape<T>({1, 1, 1, 1026});
}

TEST(rotary_fp32) { check_shapes<float>(); }
TEST(rotary_bf16) { check_shapes<Bf16>(); }
TEST(rotary_fp16) { check_shapes<Fp16>(); }

TEST(rotary_of_nothing_launches_nothing) {
  cuemu::take_launches();
  CHECK_LAUNCH(cuda::launch_rotary({nullptr, {}, nullptr, nullptr, 0, 2, 0, 3, 8, false, nullptr, {}}, Dtype::kBfloat16,
                                   nullptr));
  CHECK(cuemu::take_launches().empty(), "a launch");
}

}  // namespace
