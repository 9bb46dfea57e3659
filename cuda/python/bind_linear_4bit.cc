#include <pybind11/stl.h>

#include <array>
#include <limits>

#include "cuda/linear_4bit.h"
#include "cuda/matmul_plan.h"
#include "cuda/python/device_weight.h"
#include "cuda/python/errors.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using PlanFields = std::array<int64_t, 7>;       // of MatmulPlan, in order
using QuestionFields = std::array<int64_t, 11>;  // of MatmulQuestion, in order

PlanFields fields_of(const cuda::MatmulPlan& plan) {
  return {static_cast<int64_t>(plan.kind),
          plan.rows,
          plan.columns,
          plan.splits,
          plan.stages,
          plan.shared_bytes,
          plan.workspace_bytes};
}

int checked_int(int64_t value) {
  require(value >= 0 && value <= std::numeric_limits<int>::max(), "a field is negative or does not fit 32 bits.");
  return static_cast<int>(value);
}

cuda::MatmulQuestion checked_question(const QuestionFields& fields) {
  const auto [m, n, k, r, block_size, dtype, forward, low_memory, compute_capability, sm_count, type] = fields;
  require(m > 0 && n > 0 && k > 0 && r >= 0 && sm_count > 0, "m, n, k, r or sm_count is out of range.");
  require(type >= 0 && type < kQuantTypes, "there is no such quant_type.");
  check_block_size(block_size);
  return {m,
          n,
          k,
          r,
          block_size,
          checked_dtype(checked_int(dtype)),
          forward != 0,
          low_memory != 0,
          checked_int(compute_capability),
          checked_int(sm_count),
          static_cast<QuantType>(type)};
}

PlanFields plan_matmul(const QuestionFields& question) {
  return fields_of(cuda::plan_matmul(checked_question(question)));
}

// A plan as plan_matmul gave it. Its fields choose among what is compiled; what no kernel has is refused at the launch.
cuda::MatmulPlan checked_plan(const PlanFields& fields, int64_t workspace_bytes) {
  const auto [kind, rows, columns, splits, stages, shared, workspace] = fields;
  require(kind >= 0 && kind < static_cast<int64_t>(cuda::MatmulKind::kTwoStep), "the plan has no fused kernel.");
  require(rows > 0 && columns > 0 && splits > 0, "rows, columns or splits of the plan is not positive.");
  require(workspace >= 0 && workspace <= workspace_bytes, "the workspace is smaller than the plan's.");
  return {static_cast<cuda::MatmulKind>(kind),
          static_cast<int>(rows),
          static_cast<int>(columns),
          static_cast<int>(splits),
          static_cast<int>(stages),
          shared,
          workspace};
}

void linear(bool forward, int dtype, Address x, Address bias, Address low, Address up, int64_t r, Address y, int64_t m,
            int64_t n, int64_t k, const PlanFields& plan_fields, Address workspace, int64_t workspace_bytes,
            Address stream, const WeightFields& weight) {
  const py::gil_scoped_release release;
  ProductJob product{};
  product.weight = checked_device_weight(weight);
  const int64_t numel = product.weight.numel;
  require(m > 0 && n > 0 && k > 0 && r >= 0, "m, n, k or r is out of range.");
  require(numel / n == k && numel % n == 0, "the weight's number of elements is not n * k.");
  require((low != 0) == (r != 0) && (up != 0) == (r != 0), "an adapter of rank r > 0, and no other, has both factors.");
  require(x % 16 == 0 && bias % 2 == 0 && low % 16 == 0 && up % 16 == 0 && y % 16 == 0 &&
              std::get<0>(weight) % 16 == 0 && workspace % 16 == 0,
          "an operand is not aligned to 16 bytes.");
  product.dtype = checked_dtype(dtype);
  product.forward = forward;
  require(forward || bias == 0, "an input gradient has no bias.");
  product.m = m;
  product.n = n;
  product.k = k;
  product.x = any_pointer(product.dtype, x, m * product.depth(), "x");
  product.bias = reinterpret_cast<const void*>(bias);
  product.low = reinterpret_cast<const void*>(low);
  product.up = reinterpret_cast<const void*>(up);
  product.r = r;
  product.y = any_pointer(product.dtype, y, m * product.width(), "y");
  const cuda::MatmulPlan plan = checked_plan(plan_fields, workspace_bytes);
  check_cuda(cuda::launch_linear_4bit(product, plan, reinterpret_cast<void*>(workspace),
                                      reinterpret_cast<cudaStream_t>(stream)),
             "linear_4bit");
}

}  // namespace

void bind_linear_4bit(py::module_& module) {
  module.def("plan_matmul", &plan_matmul, py::arg("question"),
             "The fields of MatmulPlan (kind, rows, columns, splits, stages, shared and workspace bytes) for "
             "those of MatmulQuestion (m, n, k, r, block_size, dtype, forward, low_memory, compute_capability, "
             "sm_count, quant_type).");
  module.def("linear_4bit", &linear, py::arg("forward"), py::arg("dtype"), py::arg("x"), py::arg("bias"),
             py::arg("low"), py::arg("up"), py::arg("r"), py::arg("y"), py::arg("m"), py::arg("n"), py::arg("k"),
             py::arg("plan"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"), py::arg("weight"),
             "y = x W^T + bias + low up^T, or the input gradient y = x W + low up, by the fused kernel of the plan.");
}

}  // namespace qlora_native::python
