// The shipped kernels against the CPU op, byte for byte.
#include <algorithm>
#include <limits>

#include "cpu/adamw_step.h"
#include "cuda/adamw_step.cuh"
#include "cuda/adamw_step.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/optim_case.h"

using namespace qlora_native;

namespace {

std::vector<AdamwOptions> groups(bool decoupled) {
  return {{1e-2, 0.9, 0.99, 1e-8, 0.1, decoupled}, {3e-3, 0.8, 0.95, 1e-6, 0.0, decoupled}};
}

cuemu::DeviceBuffer<double> rows(bool decoupled) {
  std::vector<double> numbers;
  for (const AdamwOptions& by : groups(decoupled)) {
    numbers.insert(numbers.end(), {by.lr, by.beta1, by.beta2, by.eps, by.weight_decay});
  }
  return cuemu::DeviceBuffer<double>(numbers);
}

TEST(adamw_without_a_norm) {
  for (const bool decoupled : {true, false}) {
    cuemu::over_all_schedules([&](const char* schedule) {
      cuemu::OptimCase tensors(cuemu::mixed_tensors(), 1);
      const cuemu::DeviceBuffer<double> options = rows(decoupled);
      const cuemu::StepScalars scalars;
      const cuda::StepInputs inputs{0.75, 0.0, nullptr, nullptr, nullptr};
      for (int step = 0; step < 3; ++step) {
        tensors.new_gradients();
        cpu::adamw_step(tensors.host(), tensors.count(), groups(decoupled).data(), 0.75);
        CHECK_LAUNCH(cuda::launch_adamw_step(tensors.device(), options.data(), decoupled, inputs, scalars.results(),
                                             scalars.finished.data(), nullptr));
      }
      tensors.check_same(schedule);
      CHECK(scalars.skipped.host()[0] == 0.0f && scalars.grad_norm.host()[0] == 0.0, "results");
      CHECK(scalars.finished.host()[0] == 0, "the count is not left at 0");
    });
  }
}

// What python/qlora_native/optim.py reckons on the host: the unscaled norm, and what every gradient is multiplied by.
struct Clipping {
  double norm;
  double factor;
};

Clipping clipping(const cuemu::OptimCase& tensors, double grad_scale, double max_norm) {
  const double factor = 1.0 / grad_scale;
  const double norm = factor * cpu::gradient_norm(tensors.host(), tensors.count());
  return {norm, factor * std::min(1.0, max_norm / (norm + 1e-6))};
}

// A norm and its step, twice launched for each.
TEST(adamw_clips_and_unscales) {
  for (const double max_norm : {0.5, 1e9, std::numeric_limits<double>::infinity()}) {
    cuemu::over_all_schedules([&](const char* schedule) {
      cuemu::OptimCase tensors(cuemu::mixed_tensors(), 2);
      const cuemu::DeviceBuffer<double> options = rows(true);
      const cuemu::StepScalars scalars;
      scalars.grad_scale.data()[0] = 1000.0f;
      scalars.found_inf.data()[0] = 0.0f;
      const cuda::StepInputs inputs{1.0, max_norm, scalars.grad_scale.data(), scalars.found_inf.data(),
                                    scalars.norm.data()};
      cuemu::take_launches();
      for (int step = 0; step < 2; ++step) {
        tensors.new_gradients(1000.0f);
        const Clipping by = clipping(tensors, 1000.0, max_norm);
        cpu::adamw_step(tensors.host(), tensors.count(), groups(true).data(), by.factor);
        CHECK_LAUNCH(cuda::launch_gradient_norm(tensors.device(), tensors.workspace(), scalars.norm.data(), nullptr));
        CHECK_LAUNCH(cuda::launch_adamw_step(tensors.device(), options.data(), true, inputs, scalars.results(),
                                             scalars.finished.data(), nullptr));
        CHECK(scalars.grad_norm.host()[0] == by.norm && scalars.skipped.host()[0] == 0.0f, "%a, expected %a",
              scalars.grad_norm.host()[0], by.norm);
      }
      CHECK(cuemu::take_launches().size() == 4, "two launches a step");
      tensors.check_same(schedule);
    });
  }
}

TEST(adamw_skips_what_is_not_finite) {
  enum class Why : uint8_t { kGradient, kFoundInf, kScale };
  for (const Why why : {Why::kGradient, Why::kFoundInf, Why::kScale}) {
    cuemu::OptimCase tensors(cuemu::mixed_tensors(), 3);
    const cuemu::DeviceBuffer<double> options = rows(true);
    const cuemu::StepScalars scalars;
    scalars.grad_scale.data()[0] = why == Why::kScale ? 0.0f : 2.0f;
    scalars.found_inf.data()[0] = why == Why::kFoundInf ? 1.0f : 0.0f;
    const cuda::StepInputs inputs{1.0, 1.0, scalars.grad_scale.data(), scalars.found_inf.data(), scalars.norm.data()};
    const auto step = [&](const char* what, float skipped) {
      CHECK_LAUNCH(cuda::launch_gradient_norm(tensors.device(), tensors.workspace(), scalars.norm.data(), nullptr));
      CHECK_LAUNCH(cuda::launch_adamw_step(tensors.device(), options.data(), true, inputs, scalars.results(),
                                           scalars.finished.data(), nullptr));
      CHECK(scalars.skipped.host()[0] == skipped, "%s", what);
      tensors.check_same(what);
    };
    tensors.new_gradients();
    if (why == Why::kGradient) {
      tensors.set_gradient(6, 8300, std::numeric_limits<float>::infinity());
    }
    step("skipped", 1.0f);
    // The next step is the first.
    tensors.new_gradients();
    scalars.grad_scale.data()[0] = 2.0f;
    scalars.found_inf.data()[0] = 0.0f;
    cpu::adamw_step(tensors.host(), tensors.count(), groups(true).data(), clipping(tensors, 2.0, 1.0).factor);
    step("after it", 0.0f);
  }
}

// Without a norm, what is not finite spreads as on the CPU: a coded block becomes NaN as a whole.
TEST(adamw_spreads_what_is_not_finite) {
  cuemu::OptimCase tensors(cuemu::mixed_tensors(), 4);
  const cuemu::DeviceBuffer<double> options = rows(true);
  const cuemu::StepScalars scalars;
  for (int step = 0; step < 2; ++step) {
    tensors.new_gradients();
    tensors.set_gradient(2, 5, std::numeric_limits<float>::infinity());
    tensors.set_gradient(5, 4999, std::numeric_limits<float>::quiet_NaN());
    tensors.set_gradient(6, 0, -std::numeric_limits<float>::infinity());
    cpu::adamw_step(tensors.host(), tensors.count(), groups(true).data(), 1.0);
    CHECK_LAUNCH(cuda::launch_adamw_step(tensors.device(), options.data(), true, {1.0, 0.0, nullptr, nullptr, nullptr},
                                         {nullptr, nullptr}, scalars.finished.data(), nullptr));
    tensors.check_same("not finite");
  }
}

// Thread blocks that take several chunks, and late steps.
TEST(adamw_a_grid_that_strides) {
  cuemu::over_all_schedules([&](const char* schedule) {
    cuemu::OptimCase tensors(cuemu::mixed_tensors(), 5);
    const cuemu::DeviceBuffer<double> options = rows(true);
    const cuemu::StepScalars scalars;
    for (int64_t i = 0; i < tensors.count(); ++i) {
      *tensors.host()[i].step = static_cast<float>(1000 * i);
      *tensors.device().tensors[i].step = static_cast<float>(1000 * i);
    }
    tensors.new_gradients();
    cpu::adamw_step(tensors.host(), tensors.count(), groups(true).data(), 1.0);
    CHECK_LAUNCH(wp::launch(cuda::adamw_step_kernel<true>, dim3(3), dim3(cuda::kStepThreads), 0, nullptr,
                            tensors.device(), options.data(), cuda::StepInputs{1.0, 0.0, nullptr, nullptr, nullptr},
                            scalars.results(), scalars.finished.data()));
    tensors.check_same(schedule);
  });
}

TEST(adamw_of_nothing_still_counts) {
  cuemu::OptimCase tensors({{0}, {0}}, 6);
  const cuemu::DeviceBuffer<double> options = rows(true);
  const cuemu::StepScalars scalars;
  cpu::adamw_step(tensors.host(), tensors.count(), groups(true).data(), 1.0);
  CHECK_LAUNCH(cuda::launch_adamw_step(tensors.device(), options.data(), true, {1.0, 0.0, nullptr, nullptr, nullptr},
                                       scalars.results(), scalars.finished.data(), nullptr));
  tensors.check_same("nothing");
}

// Captured once, replayed with other gradients, learning rates and scales: all that changes is in device memory.
TEST(adamw_in_a_graph) {
  cuemu::OptimCase tensors(cuemu::mixed_tensors(), 7);
  const cuemu::DeviceBuffer<double> options = rows(true);
  const cuemu::StepScalars scalars;
  scalars.found_inf.data()[0] = 0.0f;
  const cuda::StepInputs inputs{1.0, 1.0, scalars.grad_scale.data(), scalars.found_inf.data(), scalars.norm.data()};
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CHECK_LAUNCH(cudaStreamCreate(&stream));
  CHECK_LAUNCH(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK_LAUNCH(cuda::launch_gradient_norm(tensors.device(), tensors.workspace(), scalars.norm.data(), stream));
  CHECK_LAUNCH(cuda::launch_adamw_step(tensors.device(), options.data(), true, inputs, scalars.results(),
                                       scalars.finished.data(), stream));
  CHECK_LAUNCH(cudaStreamEndCapture(stream, &graph));
  CHECK_LAUNCH(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<AdamwOptions> by = groups(true);
  for (int step = 1; step <= 3; ++step) {
    by[0].lr = 1e-2 / step;
    options.data()[0] = by[0].lr;
    scalars.grad_scale.data()[0] = static_cast<float>(step);
    tensors.new_gradients(static_cast<float>(step));
    cpu::adamw_step(tensors.host(), tensors.count(), by.data(), clipping(tensors, step, 1.0).factor);
    CHECK_LAUNCH(cudaGraphLaunch(executable, stream));
    tensors.check_same("replayed");
  }
  CHECK_LAUNCH(cudaGraphExecDestroy(executable));
  CHECK_LAUNCH(cudaGraphDestroy(graph));
  CHECK_LAUNCH(cudaStreamDestroy(stream));
}

}  // namespace
