// Budgets of bank conflicts for the kernels that multiply by a 4-bit weight.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "cpp/oracle.h"
#include "cuda/linear_4bit.h"
#include "cuda_on_cpu/banks.h"
#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/device_weight.h"
#include "cuda_on_cpu/product_case.h"

using namespace qlora_native;

namespace {

struct Budget {
  cuda::MatmulPlan plan;
  bool forward;
  double passes;  // for each that an access without conflicts takes, at most
  QuantType type = QuantType::kNf4;
};

void launch(const Budget& budget) {
  const int64_t m = budget.plan.rows;
  const int64_t n = 256;
  const int64_t k = 256;
  const bool is_nf4 = budget.type == QuantType::kNf4;
  const oracle::RandomWeight weight(n * k, is_nf4 ? 64 : oracle::block_of(budget.type), is_nf4, budget.type, 1);
  const cuemu::DeviceWeight on_device(weight.view);
  oracle::Random random(2);
  const cuemu::DeviceBuffer<Bf16> x(oracle::uniform_values<Bf16>(random, m * 256));
  const cuemu::DeviceBuffer<Bf16> y(static_cast<size_t>(m * 256));
  const ProductJob job{
      on_device.view(), Dtype::kBfloat16, budget.forward, x.data(), nullptr, nullptr, nullptr, 0, y.data(), m, n, k};
  CHECK_LAUNCH(cuda::launch_linear_4bit(job, budget.plan, nullptr, nullptr));
}

// In the race build, which counts plain loads and stores too.
void check(const Budget& budget) {
  cuemu::counters() = {};
  cuemu::watches_banks = true;
  launch(budget);
  cuemu::watches_banks = false;
  double passes = 0.0;
  double least = 0.0;
  for (const cuemu::BankCount& count : cuemu::take_bank_counts()) {
    passes += static_cast<double>(count.passes);
    least += static_cast<double>(count.least);
    if (std::getenv("CUEMU_VERBOSE") != nullptr) {
      std::printf("  %s: %ld accesses, %ld passes, %ld at least\n", count.where.c_str(),
                  static_cast<long>(count.accesses), static_cast<long>(count.passes), static_cast<long>(count.least));
    }
  }
  CHECK(passes <= budget.passes * least, "rows %d, columns %d, forward %d, type %d: %g passes for %g", budget.plan.rows,
        budget.plan.columns, budget.forward, static_cast<int>(budget.type), passes, least);
  CHECK(cuemu::counters().ldmatrix == cuemu::counters().ldmatrix_wavefronts, "ldmatrix, rows %d", budget.plan.rows);
}

TEST(products_keep_their_bank_budgets) {
  std::vector<Budget> budgets;
  for (const int tokens : {4, 8, 16}) {
    budgets.push_back({cuemu::gemv_plan({tokens, 256, 256}, 16), true, 1.7});  // its sums of warps meet each bank twice
  }
  for (const int number : {0, 1, 2, 3}) {
    for (const bool forward : {true, false}) {
      budgets.push_back({cuemu::tile_plan({}, number, 1), forward, 1.04});  // nested scales are looked up at random
    }
  }
  for (const QuantType type : oracle::kGgufTypes) {
    for (const int number : {1, 2}) {
      budgets.push_back({cuemu::tile_plan({}, number, 1), true, 1.45, type});
    }
  }
  for (const Budget& budget : budgets) {
    cuemu::over_all_schedules([&](const char*) { check(budget); });
  }
}

}  // namespace
