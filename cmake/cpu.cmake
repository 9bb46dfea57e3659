# The torch-free core: one object file per instruction set, each with its own flags; nothing else gets them.

if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  find_package(OpenMP REQUIRED COMPONENTS CXX)
  set(file_store bus_error file_store mapped_file weight_stream)
  list(TRANSFORM file_store REPLACE "(.+)" "cpp/cpu/files/\\1.cc")
else()
  find_package(OpenMP COMPONENTS CXX)
  set(file_store cpp/cpu/files/file_store_memory.cc)
  if(NOT OpenMP_CXX_FOUND)
    message(STATUS "qlora_native: the CPU kernels run on one thread (no OpenMP was found)")
  endif()
endif()

add_library(qlora_native_cpu STATIC
  cpp/cpu/adamw_step.cc
  cpp/cpu/causal_attention.cc
  cpp/cpu/dequantize_4bit.cc
  cpp/cpu/experts_4bit.cc
  cpp/cpu/gptq_4bit.cc
  cpp/cpu/gradient_norm.cc
  cpp/cpu/linear_4bit.cc
  cpp/cpu/linear_cross_entropy.cc
  cpp/cpu/lion_step.cc
  cpp/cpu/quantize_4bit.cc
  cpp/cpu/rms_norm.cc
  cpp/cpu/rotary.cc
  cpp/cpu/search_scales_4bit.cc
  cpp/cpu/swiglu.cc
  ${file_store}
  cpp/cpu/files/paging.cc
  cpp/cpu/files/side_thread.cc
  cpp/cpu/isa/isa.cc
  cpp/cpu/isa/isa_scalar.cc
  cpp/cpu/kernels/gemm.cc
  cpp/cpu/kernels/kernels.cc
  cpp/cpu/kernels/tiles.cc)
target_include_directories(qlora_native_cpu PUBLIC cpp)
# No contraction: a product and a sum that the arithmetic rule keeps apart must not be fused.
target_compile_options(qlora_native_cpu PUBLIC
  ${QLORA_NATIVE_WARNINGS} -ffp-contract=off
  # Packing pairs of arrays is what the kernels do; GCC 12 warns on its own intrinsics headers there.
  $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
if(OpenMP_CXX_FOUND AND NOT QLORA_NATIVE_SANITIZE STREQUAL "thread")  # which reports libgomp's barriers as races
  target_link_libraries(qlora_native_cpu PUBLIC OpenMP::OpenMP_CXX)
else()
  target_compile_options(qlora_native_cpu PUBLIC -Wno-unknown-pragmas)
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set(avx512_bf16 ${avx512} -mavx512bf16)
  set(amx ${avx512_bf16} -mamx-tile -mamx-bf16)
  set(isas avx2 avx512 avx512_bf16 amx)
  if(QLORA_NATIVE_EMULATE_ISAS)
    set(emulation ${avx2} -Wno-psabi -include ${PROJECT_SOURCE_DIR}/tests/avx512_on_avx2)
    set(avx512 ${emulation}/avx512.h)
    set(avx512_bf16 ${emulation}/bf16.h)
    set(amx ${emulation}/tiles.h)
    set_source_files_properties(cpp/cpu/isa/isa.cc PROPERTIES COMPILE_DEFINITIONS QLORA_NATIVE_EMULATE_ISAS)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  set(neon "")  # part of the architecture
  set(neon_bf16 -mcpu=generic+bf16)
  set(isas neon neon_bf16)
endif()
# Compiling kernels with sanitizers takes six times as long, so that may be asked of some alone.
set(sanitized_isas ${QLORA_NATIVE_SANITIZE_ISAS})
if(NOT sanitized_isas)
  set(sanitized_isas scalar ${isas})
endif()
foreach(isa scalar ${isas})
  if(QLORA_NATIVE_SANITIZE AND NOT isa IN_LIST sanitized_isas)
    list(APPEND ${isa} -fno-sanitize=all)
  endif()
endforeach()
set_source_files_properties(cpp/cpu/isa/isa_scalar.cc PROPERTIES COMPILE_OPTIONS "${scalar}")
foreach(isa ${isas})
  target_sources(qlora_native_cpu PRIVATE cpp/cpu/isa/isa_${isa}.cc)
  # Optimized in debug builds too. An inline function that is not inlined here is compiled for this instruction set, and
  # the linker may keep that copy for everybody (tests/test_build_options.py reads the objects).
  set_source_files_properties(cpp/cpu/isa/isa_${isa}.cc PROPERTIES COMPILE_OPTIONS
    "${${isa}};$<$<NOT:$<OR:$<CONFIG:Release>,$<BOOL:${QLORA_NATIVE_SANITIZE}>>>:-O3>")
endforeach()

if(QLORA_NATIVE_SANITIZE)
  if(QLORA_NATIVE_SANITIZE STREQUAL "thread")
    set(sanitizers thread)
  else()
    set(sanitizers address,undefined)
  endif()
  # -O1, checks by calls, null pointers left to the address sanitizer: compiling the kernels' templates is what costs.
  target_compile_options(qlora_native_cpu PUBLIC
    -O1 -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-sanitize=null,object-size -fno-omit-frame-pointer
    $<$<CXX_COMPILER_ID:GNU>:--param=asan-instrumentation-with-call-threshold=0>)
  target_link_options(qlora_native_cpu PUBLIC -fsanitize=${sanitizers})
endif()
