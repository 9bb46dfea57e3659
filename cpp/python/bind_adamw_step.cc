#include <pybind11/stl.h>

#include "cpu/adamw_step.h"
#include "python/paged_order.h"
#include "python/tensor_rows.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using AdamwFields = std::vector<std::tuple<double, double, double, double, double, bool>>;

void adamw_step(Address rows, int64_t num_tensors, const AdamwFields& options, double grad_factor, cpu::Pager* pager,
                Address numbers, int64_t budget_bytes) {
  const auto groups = static_cast<int64_t>(options.size());
  const std::vector<OptimTensor> tensors = checked_rows(rows, num_tensors, {true, true, groups});
  std::vector<AdamwOptions> by;
  for (const auto& [lr, beta1, beta2, eps, weight_decay, decoupled] : options) {
    by.push_back({lr, beta1, beta2, eps, weight_decay, decoupled});
  }
  const cpu::UpdateOrder order = checked_order(tensors, pager, numbers, budget_bytes);
  const py::gil_scoped_release release;
  cpu::adamw_step(tensors.data(), num_tensors, by.data(), grad_factor, order);
}

std::vector<std::vector<float>> state_code(bool is_signed) {
  const StateCode& code = is_signed ? kSignedState : kUnsignedState;
  return {{code.a, code.a + 8},
          {code.b, code.b + 8},
          {code.alpha, code.alpha + 32},
          {code.beta, code.beta + 32},
          {code.lowest, static_cast<float>(code.top)}};
}

}  // namespace

void bind_adamw_step(py::module_& module) {
  module.def(
      "adamw_step", &adamw_step, py::arg("rows"), py::arg("num_tensors"), py::arg("options"), py::arg("grad_factor"),
      py::arg("pager") = nullptr, py::arg("numbers") = 0, py::arg("budget_bytes") = 0,
      "One step over the tensors of a table at address rows, int64 [num_tensors, 10]: param, grad, exp_avg, "
      "exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, step, numel, dtype, group. options holds (lr, beta1, "
      "beta2, eps, weight_decay, decoupled) of each group. With a pager, int64 [num_tensors] at address numbers are "
      "the numbers of the tensors among the pager's, or -1, and no more than budget_bytes are resident.");
  module.attr("optim_row_length") = static_cast<int>(kRowLength);
  module.attr("state_block") = kStateBlock;
  module.def("state_code", &state_code, py::arg("signed"),
             "Tables a [8], b [8], alpha [32], beta [32] and (lowest, top) of an 8-bit state's code.");
}

}  // namespace qlora_native::python
