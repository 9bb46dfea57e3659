// The shipped kernel against the CPU op, byte for byte.
#include <algorithm>
#include <limits>

#include "cpu/lion_step.h"
#include "cuda/lion_step.cuh"
#include "cuda/lion_step.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/optim_case.h"

using namespace qlora_native;

namespace {

const std::vector<LionOptions> kGroups = {{1e-2, 0.9, 0.99, 0.1}, {3e-3, 0.8, 0.95, 0.0}};

cuemu::DeviceBuffer<double> rows() {
  std::vector<double> numbers;
  for (const LionOptions& by : kGroups) {
    numbers.insert(numbers.end(), {by.lr, by.beta1, by.beta2, by.weight_decay});
  }
  return cuemu::DeviceBuffer<double>(numbers);
}

TEST(lion_without_a_norm) {
  cuemu::over_all_schedules([&](const char* schedule) {
    cuemu::OptimCase tensors(cuemu::mixed_tensors(), 1);
    const cuemu::DeviceBuffer<double> options = rows();
    const cuemu::StepScalars scalars;
    for (int step = 0; step < 3; ++step) {
      tensors.new_gradients();
      cpu::lion_step(tensors.host(), tensors.count(), kGroups.data(), 0.75);
      CHECK_LAUNCH(cuda::launch_lion_step(tensors.device(), options.data(), {0.75, 0.0, nullptr, nullptr, nullptr},
                                          scalars.results(), scalars.finished.data(), nullptr));
    }
    tensors.check_same(schedule);
    CHECK(scalars.skipped.host()[0] == 0.0f && scalars.finished.host()[0] == 0, "results");
  });
}

TEST(lion_clips_unscales_and_skips) {
  cuemu::OptimCase tensors(cuemu::mixed_tensors(), 2);
  const cuemu::DeviceBuffer<double> options = rows();
  const cuemu::StepScalars scalars;
  scalars.grad_scale.data()[0] = 8.0f;
  const cuda::StepInputs inputs{1.0, 0.5, scalars.grad_scale.data(), nullptr, scalars.norm.data()};
  for (const bool finite : {true, false, true}) {
    tensors.new_gradients(8.0f);
    if (finite) {
      const double norm = cpu::gradient_norm(tensors.host(), tensors.count()) / 8.0;
      cpu::lion_step(tensors.host(), tensors.count(), kGroups.data(), std::min(1.0, 0.5 / (norm + 1e-6)) / 8.0);
    } else {
      tensors.set_gradient(9, 699, std::numeric_limits<float>::quiet_NaN());
    }
    CHECK_LAUNCH(cuda::launch_gradient_norm(tensors.device(), tensors.workspace(), scalars.norm.data(), nullptr));
    CHECK_LAUNCH(cuda::launch_lion_step(tensors.device(), options.data(), inputs, scalars.results(),
                                        scalars.finished.data(), nullptr));
    tensors.check_same(finite ? "clipped" : "skipped");
    CHECK(scalars.skipped.host()[0] == (finite ? 0.0f : 1.0f), "skipped is %g",
          static_cast<double>(scalars.skipped.host()[0]));
  }
}

TEST(lion_spreads_what_is_not_finite) {
  cuemu::OptimCase tensors(cuemu::mixed_tensors(), 3);
  const cuemu::DeviceBuffer<double> options = rows();
  const cuemu::StepScalars scalars;
  for (int step = 0; step < 2; ++step) {
    tensors.new_gradients();
    tensors.set_gradient(2, 5, std::numeric_limits<float>::infinity());
    tensors.set_gradient(5, 4999, std::numeric_limits<float>::quiet_NaN());
    cpu::lion_step(tensors.host(), tensors.count(), kGroups.data(), 1.0);
    CHECK_LAUNCH(cuda::launch_lion_step(tensors.device(), options.data(), {1.0, 0.0, nullptr, nullptr, nullptr},
                                        {nullptr, nullptr}, scalars.finished.data(), nullptr));
    tensors.check_same("not finite");
  }
}

TEST(lion_a_grid_that_strides) {
  cuemu::over_all_schedules([&](const char* schedule) {
    cuemu::OptimCase tensors(cuemu::mixed_tensors(), 4);
    const cuemu::DeviceBuffer<double> options = rows();
    const cuemu::StepScalars scalars;
    tensors.new_gradients();
    cpu::lion_step(tensors.host(), tensors.count(), kGroups.data(), 1.0);
    CHECK_LAUNCH(wp::launch(cuda::lion_step_kernel<cuda::kStepThreads>, dim3(3), dim3(cuda::kStepThreads), 0, nullptr,
                            tensors.device(), options.data(), cuda::StepInputs{1.0, 0.0, nullptr, nullptr, nullptr},
                            scalars.results(), scalars.finished.data()));
    tensors.check_same(schedule);
  });
}

}  // namespace
