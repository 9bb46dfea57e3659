# The torch-free CUDA core: kernels and launchers compiled by nvcc, with the CUDA runtime linked in.

find_package(CUDAToolkit REQUIRED)
include(CheckCompilerFlag)
check_compiler_flag(CUDA "-Xfatbin=--compress-mode=size" QLORA_NATIVE_FATBIN_COMPRESSES)

add_library(qlora_native_cuda STATIC
  cuda/adamw_step.cu
  cuda/dequantize_4bit.cu
  cuda/gradient_norm.cu
  cuda/linear_4bit.cu
  cuda/linear_4bit_bf16.cu
  cuda/linear_4bit_fp16.cu
  cuda/linear_4bit_gguf.cu
  cuda/linear_cross_entropy.cu
  cuda/lion_step.cu
  cuda/managed_store.cc
  cuda/matmul_plan.cc
  cuda/page_store.cc
  cuda/paged_table.cc
  cuda/pinned_store.cc
  cuda/quantize_4bit.cu
  cuda/rms_norm.cu
  cuda/rotary.cu
  cuda/swiglu.cu
  cuda/tables.cu)
target_include_directories(qlora_native_cuda PUBLIC cpp ${PROJECT_SOURCE_DIR})
set_target_properties(qlora_native_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_link_libraries(qlora_native_cuda PUBLIC CUDA::cudart_static)
target_compile_options(qlora_native_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${QLORA_NATIVE_WARNINGS}>")
target_compile_options(qlora_native_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:
  --fmad=false  # as -ffp-contract=off: the arithmetic rule fixes where to round
  --expt-relaxed-constexpr  # std::bit_cast in device code
  $<$<BOOL:${QLORA_NATIVE_WERROR}>:-Xcompiler=-Werror>
  "$<$<BOOL:${QLORA_NATIVE_WERROR}>:SHELL:-Werror all-warnings>"
  "$<$<BOOL:${QLORA_NATIVE_WERROR}>:SHELL:-Xptxas -warn-spills,-warn-lmem-usage>"
  -Xcompiler=-Wall,-Wextra,-Wshadow,-Wconversion,-Wsign-conversion,-ffp-contract=off
  $<$<BOOL:${QLORA_NATIVE_FATBIN_COMPRESSES}>:-Xfatbin=--compress-mode=size>>)
