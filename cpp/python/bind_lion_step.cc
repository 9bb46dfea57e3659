#include <pybind11/stl.h>

#include "cpu/lion_step.h"
#include "python/paged_order.h"
#include "python/tensor_rows.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using LionFields = std::vector<std::tuple<double, double, double, double>>;

void lion_step(Address rows, int64_t num_tensors, const LionFields& options, double grad_factor, cpu::Pager* pager,
               Address numbers, int64_t budget_bytes) {
  const auto groups = static_cast<int64_t>(options.size());
  const std::vector<OptimTensor> tensors = checked_rows(rows, num_tensors, {true, false, groups});
  std::vector<LionOptions> by;
  for (const auto& [lr, beta1, beta2, weight_decay] : options) {
    by.push_back({lr, beta1, beta2, weight_decay});
  }
  const cpu::UpdateOrder order = checked_order(tensors, pager, numbers, budget_bytes);
  const py::gil_scoped_release release;
  cpu::lion_step(tensors.data(), num_tensors, by.data(), grad_factor, order);
}

}  // namespace

void bind_lion_step(py::module_& module) {
  module.def("lion_step", &lion_step, py::arg("rows"), py::arg("num_tensors"), py::arg("options"),
             py::arg("grad_factor"), py::arg("pager") = nullptr, py::arg("numbers") = 0, py::arg("budget_bytes") = 0,
             "One step over the tensors of a table as adamw_step's, without its second moment and step; options holds "
             "(lr, beta1, beta2, weight_decay) of each group.");
}

}  // namespace qlora_native::python
