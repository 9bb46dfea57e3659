# The extension modules: _C always, _cuda when there is a CUDA compiler.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

# Bindings check and pass on; compiling them is mostly reading pybind11 and instantiating it. So both are done once for
# several files, and neither the optimizer's higher levels nor its second run at link time (which pybind11 asks for by
# default) are spent.
set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)
function(compile_bindings_fast module)
  set_target_properties(${module} PROPERTIES UNITY_BUILD ON)
  target_compile_options(${module} PRIVATE $<$<CONFIG:Release>:-O1>)
endfunction()

pybind11_add_module(_C MODULE
  cpp/python/bind_adamw_step.cc
  cpp/python/bind_causal_attention.cc
  cpp/python/bind_dequantize_4bit.cc
  cpp/python/bind_experts_4bit.cc
  cpp/python/bind_gptq_4bit.cc
  cpp/python/bind_gradient_norm.cc
  cpp/python/bind_linear_4bit.cc
  cpp/python/bind_lion_step.cc
  cpp/python/bind_linear_cross_entropy.cc
  cpp/python/bind_mapped_file.cc
  cpp/python/bind_paging.cc
  cpp/python/bind_quantize_4bit.cc
  cpp/python/bind_rms_norm.cc
  cpp/python/bind_rotary.cc
  cpp/python/bind_search_scales_4bit.cc
  cpp/python/bind_swiglu.cc
  cpp/python/checked_weight.cc
  cpp/python/module.cc
  cpp/python/tensor_rows.cc)
target_link_libraries(_C PRIVATE qlora_native_cpu)
compile_bindings_fast(_C)
target_compile_definitions(_C PRIVATE
  QLORA_NATIVE_VERSION="${QLORA_NATIVE_VERSION}"
  QLORA_NATIVE_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  QLORA_NATIVE_CUDA_ARCHS_BUILT="${QLORA_NATIVE_CUDA_ARCHS_BUILT}"
  QLORA_NATIVE_CUDA_LACKING="${QLORA_NATIVE_CUDA_LACKING}")
install(TARGETS _C DESTINATION qlora_native)

if(QLORA_NATIVE_CUDA_FOUND)
  include(cmake/python_cuda.cmake)
endif()
