#include <pybind11/stl.h>

#include "core/nested_code.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = QLORA_NATIVE_VERSION;
  info["compiler"] = QLORA_NATIVE_COMPILER;
  py::list isas;
  for (const cpu::Isa isa : cpu::isas_built()) {
    isas.append(cpu::isa_name(isa));
  }
  info["isas_built"] = isas;
  info["cuda_archs"] = std::string(QLORA_NATIVE_CUDA_ARCHS_BUILT);
  info["cuda_lacking"] = std::string(QLORA_NATIVE_CUDA_LACKING);
  return info;
}

py::list block_formats() {
  py::list formats;
  for (const BlockFormat& format : kBlockFormats) {
    formats.append(py::make_tuple(format.name, format.elements, format.bytes));
  }
  return formats;
}

std::vector<float> levels(int quant_type) {
  if (has_levels(static_cast<QuantType>(quant_type))) {
    const CodeLevels table = code_levels(static_cast<QuantType>(quant_type));
    return {table.value, table.value + 16};
  }
  const Levels table = levels_of(checked_quant_type(quant_type));
  return {table.value, table.value + 16};
}

std::vector<float> boundaries(int quant_type) {
  if (checked_quant_type(quant_type) == QuantType::kNf4) {
    const Nf4Boundaries table = nf4_boundaries();
    return {table.value, table.value + 15};
  }
  const Fp4Pivots table = fp4_pivots();
  return {table.value, table.value + 7};
}

std::vector<float> nested_code() { return {kNestedCode.value, kNestedCode.value + 256}; }

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Torch-free CPU kernels of qlora_native on raw addresses.";
  module.def("build_info", &build_info, "What this library was built from and for.");
  module.def(
      "cpu_isa", [] { return std::string(cpu::isa_name(cpu::current_isa())); },
      "Name of the instruction set in use; ValueError if QLORA_NATIVE_ISA asks for one that is not here.");
  module.def(
      "take_threads_of_torch", [](Address count) { cpu::threads_of_torch = reinterpret_cast<int (*)()>(count); },
      py::arg("count"), "Loops take as many threads as at::get_num_threads, whose address this is, returns each time.");
  module.attr("block_formats") = block_formats();  // (name, elements and bytes of a block) by quant_type
  module.def("levels", &levels, py::arg("quant_type"),
             "The 16 levels, by code, of nf4 (0), fp4 (1), iq4_nl (10) or mxfp4 (11).");
  module.def("boundaries", &boundaries, py::arg("quant_type"),
             "Decision boundaries: 15 values for nf4 (0), 7 magnitudes for fp4 (1).");
  module.def("nested_code", &nested_code, "The 256 values that double-quantized scales are stored in.");
  bind_mapped_file(module);
  bind_paging(module);  // its classes are named in the signatures of others
  bind_causal_attention(module);
  bind_quantize_4bit(module);
  bind_dequantize_4bit(module);
  bind_linear_4bit(module);
  bind_experts_4bit(module);
  bind_adamw_step(module);
  bind_lion_step(module);
  bind_gptq_4bit(module);
  bind_gradient_norm(module);
  bind_linear_cross_entropy(module);
  bind_rms_norm(module);
  bind_rotary(module);
  bind_search_scales_4bit(module);
  bind_swiglu(module);
}

}  // namespace qlora_native::python
