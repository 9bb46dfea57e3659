// The shipped kernel against the CPU op, bit for bit.
#include <bit>
#include <limits>

#include "cpu/gradient_norm.h"
#include "cuda/gradient_norm.cuh"
#include "cuda/gradient_norm.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/optim_case.h"

using namespace qlora_native;

namespace {

double on_device(const cuemu::OptimCase& tensors, unsigned grid = 0) {
  const cuemu::DeviceBuffer<double> norm(1);
  const cuda::OptimTable table = tensors.device();
  if (grid == 0) {
    CHECK_LAUNCH(cuda::launch_gradient_norm(table, tensors.workspace(), norm.data(), nullptr));
  } else {
    CHECK_LAUNCH(wp::launch(cuda::gradient_norm_kernel<cuda::kNormWarps>, dim3(grid), dim3(32 * cuda::kNormWarps), 0,
                            nullptr, table, static_cast<double*>(tensors.workspace()) + 1,
                            static_cast<uint32_t*>(tensors.workspace()), norm.data()));
  }
  return norm.host()[0];
}

void check_same(double got, double expected) {
  CHECK(std::bit_cast<uint64_t>(got) == std::bit_cast<uint64_t>(expected), "%a, expected %a", got, expected);
}

TEST(norm_of_mixed_tensors) {
  cuemu::OptimCase tensors(cuemu::mixed_tensors(), 1);
  cuemu::over_all_schedules([&](const char*) {
    for (const float scale : {1.0f, 1e-30f}) {
      tensors.new_gradients(scale);
      check_same(on_device(tensors), cpu::gradient_norm(tensors.host(), tensors.count()));
    }
  });
}

// More chunks than running sums, so that their order shows; and warps that take several.
TEST(norm_of_many_chunks) {
  cuemu::OptimCase tensors({{70 * 8192 + 5, Dtype::kBfloat16}, {3 * 8192, Dtype::kFloat32}, {9000, Dtype::kFloat16}},
                           2);
  tensors.new_gradients();
  const double expected = cpu::gradient_norm(tensors.host(), tensors.count());
  check_same(on_device(tensors), expected);
  for (const unsigned grid : {1u, 3u}) {
    check_same(on_device(tensors, grid), expected);
  }
}

TEST(norm_of_nothing) {
  const cuemu::OptimCase none({}, 3);
  check_same(on_device(none), 0.0);
  const cuemu::OptimCase empty({{0}, {0}}, 3);
  check_same(on_device(empty), 0.0);
}

TEST(norm_is_not_finite_if_an_element_is_not) {
  for (const float value : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    for (const size_t tensor : {size_t{2}, size_t{6}, size_t{9}}) {
      for (const int64_t element : {0, 255, 699}) {
        cuemu::OptimCase tensors(cuemu::mixed_tensors(), 4);
        tensors.new_gradients();
        tensors.set_gradient(tensor, element, value);
        CHECK(!std::isfinite(on_device(tensors)), "tensor %zu", tensor);
      }
    }
  }
  cuemu::OptimCase largest({{9000}}, 5);
  for (int64_t i = 0; i < 9000; ++i) {
    largest.set_gradient(0, i, std::numeric_limits<float>::max());
  }
  check_same(on_device(largest), cpu::gradient_norm(largest.host(), 1));
}

TEST(norm_launches_once) {
  cuemu::OptimCase tensors(cuemu::mixed_tensors(), 6);
  tensors.new_gradients();
  cuemu::take_launches();
  on_device(tensors);
  CHECK(cuemu::take_launches().size() == 1, "not one launch");
}

}  // namespace
