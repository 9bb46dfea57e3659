# The extension module _cuda: the kernels behind bindings by the host compiler. It loads without a GPU or a driver.

pybind11_add_module(_cuda MODULE
  cpp/python/checked_weight.cc
  cpp/python/tensor_rows.cc
  cuda/python/all_bindings.cc
  cuda/python/bind_adamw_step.cc
  cuda/python/bind_dequantize_4bit.cc
  cuda/python/bind_gradient_norm.cc
  cuda/python/bind_linear_4bit.cc
  cuda/python/bind_linear_cross_entropy.cc
  cuda/python/bind_lion_step.cc
  cuda/python/bind_paging.cc
  cuda/python/bind_quantize_4bit.cc
  cuda/python/bind_rms_norm.cc
  cuda/python/bind_rotary.cc
  cuda/python/bind_swiglu.cc
  cuda/python/module.cc)
target_link_libraries(_cuda PRIVATE qlora_native_cuda)
compile_bindings_fast(_cuda)
target_compile_options(_cuda PRIVATE ${QLORA_NATIVE_WARNINGS})
target_compile_definitions(_cuda PRIVATE QLORA_NATIVE_CUDA_ARCHS_BUILT="${QLORA_NATIVE_CUDA_ARCHS_BUILT}")
install(TARGETS _cuda DESTINATION qlora_native)
