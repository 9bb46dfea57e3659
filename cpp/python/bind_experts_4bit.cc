#include "cpu/experts_4bit.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

cpu::Experts checked_experts(Address offsets, int64_t num_offsets, int64_t rows) {
  require(checked_size(num_offsets, "offsets") > 0, "offsets is empty: expected one more than there are experts.");
  const auto* values = pointer<const int64_t>(offsets, num_offsets, "offsets");
  bool rises = values[0] == 0 && values[num_offsets - 1] <= rows;
  for (int64_t i = 1; i < num_offsets; ++i) {
    rises = rises && values[i - 1] <= values[i];
  }
  if (!rises) {
    require(false, "offsets run from " + std::to_string(values[0]) + " to " + std::to_string(values[num_offsets - 1]) +
                       ": expected them to rise from 0, to the " + std::to_string(rows) + " rows at most.");
  }
  return {num_offsets - 1, values};
}

// What products in both directions have in common.
cpu::ExpertsJob checked_stack(int dtype, bool forward, Address x, Address offsets, int64_t num_offsets, Address low,
                              int64_t r, Address y, int64_t m, int64_t n, int64_t k, const WeightFields& weight) {
  cpu::ExpertsJob stack{};
  cpu::GemmJob& job = stack.job;
  job.dtype = checked_dtype(dtype);
  job.forward = forward;
  job.m = checked_size(m, "m");
  job.n = checked_size(n, "n");
  job.k = checked_size(k, "k");
  job.r = checked_size(r, "r");
  job.weight = checked_weight(weight);
  stack.experts = checked_experts(offsets, num_offsets, m);
  const int64_t count = stack.experts.count;
  check_shape(product_of({count, n}), k, job.weight.numel);
  require(count < 2 || job.weight.numel / count % job.weight.block_size == 0,
          "an expert is no whole number of blocks.");
  job.x = any_pointer(job.dtype, x, product_of({m, job.depth()}), "x");
  job.y = any_pointer(job.dtype, y, product_of({m, job.width()}), "y");
  job.made_low = r == 0 ? nullptr : any_pointer(job.dtype, low, product_of({m, r}), "low");
  job.low = job.made_low;
  return stack;
}

int64_t experts_4bit(int dtype, Address x, Address offsets, int64_t num_offsets, Address stored_down, Address stored_up,
                     Address down, Address up, int64_t r, float scale, Address y, Address low, int64_t m, int64_t n,
                     int64_t k, const WeightFields& weight, Address scratch, int64_t scratch_bytes) {
  cpu::ExpertsJob stack = checked_stack(dtype, true, x, offsets, num_offsets, low, r, y, m, n, k, weight);
  cpu::GemmJob& job = stack.job;
  const int64_t count = stack.experts.count;
  stack.up_scale = scale;
  for (int64_t expert = 0; r > 0 && expert < count; ++expert) {
    if (stack.experts.rows(expert) > cpu::few_rows(job.dtype)) {
      job.down = any_pointer(job.dtype, down, product_of({count, r, k}), "down");
      job.up = any_pointer(job.dtype, up, product_of({count, n, r}), "up");
    } else if (stack.experts.rows(expert) > 0) {
      stack.stored_down = pointer<const float>(stored_down, product_of({count, r, k}), "stored_down");
      stack.stored_up = pointer<const float>(stored_up, product_of({count, n, r}), "stored_up");
    }
  }
  const int64_t needed = cpu::experts_4bit_scratch_bytes(stack);
  if (holds(scratch, scratch_bytes, needed)) {
    cpu::experts_4bit(stack, reinterpret_cast<unsigned char*>(scratch));
    return 0;
  }
  return needed;
}

int64_t experts_4bit_backward(int dtype, Address grad_y, Address x, Address offsets, int64_t num_offsets, Address xa,
                              Address down, Address up, int64_t r, float scale, Address low, Address grad_x,
                              Address grad_a, Address grad_b, int64_t m, int64_t n, int64_t k,
                              const WeightFields& weight, Address scratch, int64_t scratch_bytes) {
  cpu::ExpertsJob stack = checked_stack(dtype, false, grad_y, offsets, num_offsets, low, r, grad_x, m, n, k, weight);
  cpu::GemmJob& job = stack.job;
  const int64_t count = stack.experts.count;
  job.down_scale = scale;
  cpu::OuterJob of_a{job.low, nullptr, 0, r, k, 1.0f, nullptr};
  cpu::OuterJob of_b{nullptr, job.x, 0, r, n, scale, nullptr};
  int64_t needed = 0;
  if (r > 0) {
    job.down = any_pointer(job.dtype, down, product_of({count, n, r}), "down");
    job.up = any_pointer(job.dtype, up, product_of({count, r, k}), "up");
    of_a.right = any_pointer(job.dtype, x, product_of({m, k}), "x");
    of_a.out = pointer<float>(grad_a, product_of({count, r, k}), "grad_a");
    of_b.left = any_pointer(job.dtype, xa, product_of({m, r}), "xa");
    of_b.out = pointer<float>(grad_b, product_of({count, r, n}), "grad_b");
    needed = std::max(cpu::experts_outer_scratch_bytes(job.dtype, stack.experts, of_a),
                      cpu::experts_outer_scratch_bytes(job.dtype, stack.experts, of_b));
  }
  needed = std::max(needed, cpu::experts_4bit_scratch_bytes(stack));
  if (!holds(scratch, scratch_bytes, needed)) {
    return needed;
  }
  auto* memory = reinterpret_cast<unsigned char*>(scratch);
  cpu::experts_4bit(stack, memory);
  if (r > 0) {
    cpu::experts_outer(job.dtype, stack.experts, of_a, memory);
    cpu::experts_outer(job.dtype, stack.experts, of_b, memory);
  }
  return 0;
}

}  // namespace

void bind_experts_4bit(py::module_& module) {
  module.def(
      "experts_4bit", &experts_4bit, py::arg("dtype"), py::arg("x"), py::arg("offsets"), py::arg("num_offsets"),
      py::arg("stored_down"), py::arg("stored_up"), py::arg("down"), py::arg("up"), py::arg("r"), py::arg("scale"),
      py::arg("y"), py::arg("low"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("weight"), py::arg("scratch"),
      py::arg("scratch_bytes"), py::call_guard<py::gil_scoped_release>(),
      "linear_4bit with each expert e of a weight [E, n, k] for its rows, from offsets[e] to offsets[e + 1]; those "
      "behind are zeros. Experts of few_rows(dtype) rows take an adapter as matrix_forward does, stored_down, "
      "stored_up and scale. Returns as linear_4bit does.");
  module.def("experts_4bit_backward", &experts_4bit_backward, py::arg("dtype"), py::arg("grad_y"), py::arg("x"),
             py::arg("offsets"), py::arg("num_offsets"), py::arg("xa"), py::arg("down"), py::arg("up"), py::arg("r"),
             py::arg("scale"), py::arg("low"), py::arg("grad_x"), py::arg("grad_a"), py::arg("grad_b"), py::arg("m"),
             py::arg("n"), py::arg("k"), py::arg("weight"), py::arg("scratch"), py::arg("scratch_bytes"),
             py::call_guard<py::gil_scoped_release>(),
             "The input gradient [m, k], by low = scale grad_y down, and in fp32 grad_a [E, r, k] = low^T x and grad_b "
             "[E, r, n] = scale xa^T grad_y. Returns as linear_4bit does.");
}

}  // namespace qlora_native::python
