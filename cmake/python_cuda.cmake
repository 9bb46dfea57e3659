# The extension module _cuda: kernels compiled by nvcc, bindings by the host compiler, the CUDA runtime linked in, so that
# it loads on a machine without a GPU or a driver.

find_package(CUDAToolkit REQUIRED)
include(CheckCompilerFlag)
check_compiler_flag(CUDA "-Xfatbin=--compress-mode=size" QLORA_NATIVE_FATBIN_COMPRESSES)

add_library(qlora_native_cuda STATIC cuda/dequantize_4bit.cu)
target_include_directories(qlora_native_cuda PUBLIC cpp ${PROJECT_SOURCE_DIR})
set_target_properties(qlora_native_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_link_libraries(qlora_native_cuda PUBLIC CUDA::cudart_static)
target_compile_options(qlora_native_cuda PRIVATE
  --fmad=false  # as -ffp-contract=off: the arithmetic rule says where to round
  --expt-relaxed-constexpr  # std::bit_cast in device code
  "SHELL:-Werror all-warnings"
  "SHELL:-Xptxas -warn-spills"
  -Xcompiler=-Wall,-Wextra,-Wshadow,-Wconversion,-Wsign-conversion,-Werror,-ffp-contract=off
  $<$<BOOL:${QLORA_NATIVE_FATBIN_COMPRESSES}>:-Xfatbin=--compress-mode=size>)

pybind11_add_module(_cuda MODULE
  cpp/python/checked_weight.cc
  cuda/python/bind_dequantize_4bit.cc
  cuda/python/module.cc)
target_link_libraries(_cuda PRIVATE qlora_native_cuda)
target_compile_options(_cuda PRIVATE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror)
target_compile_definitions(_cuda PRIVATE QLORA_NATIVE_CUDA_ARCHS_BUILT="${QLORA_NATIVE_CUDA_ARCHS_BUILT}")
install(TARGETS _cuda DESTINATION qlora_native)
