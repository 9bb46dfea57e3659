# Which nvcc compiles the kernels. Included by cuda.cmake, and run by itself in tests/test_build_options.py.

include("${CMAKE_CURRENT_LIST_DIR}/cuda_archs.cmake")

# `nvcc` is the first that is there of CMAKE_CUDA_COMPILER, CUDACXX, CUDA_HOME, CUDA_PATH, PATH and the toolkits below
# `root`. `lacking` is one line that says why none can be used, or nothing. A build for the CPU alone is an ordinary one
# where neither an nvcc nor a GPU is in sight; else a WARNING has the compiler's own words.
function(find_nvcc nvcc lacking root)
  if(CMAKE_CUDA_COMPILER)
    set(found "${CMAKE_CUDA_COMPILER}")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    separate_arguments(found UNIX_COMMAND "$ENV{CUDACXX}")  # as CMake does: arguments may follow
  else()
    file(GLOB toolkits "${root}/cuda-*")
    list(SORT toolkits COMPARE NATURAL ORDER DESCENDING)
    find_program(found nvcc NO_CACHE HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS "${root}/cuda" ${toolkits}
                 PATH_SUFFIXES bin)
  endif()
  set(why "")
  if(found)
    # As CMake calls it later: with the flags and the host compiler that the environment or the cache has.
    separate_arguments(flags UNIX_COMMAND "$ENV{CUDAFLAGS} ${CMAKE_CUDA_FLAGS}")
    set(host "${CMAKE_CUDA_HOST_COMPILER}")
    if(NOT host)
      set(host "$ENV{CUDAHOSTCXX}")
    endif()
    if(host)
      list(APPEND flags "-ccbin=${host}")
    endif()
    file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/find_nvcc/probe.cu" "int main() { return 0; }\n")
    execute_process(COMMAND ${found} ${flags} probe.cu -o probe OUTPUT_VARIABLE words ERROR_VARIABLE words
                    WORKING_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/find_nvcc" RESULT_VARIABLE status)
    if(NOT status EQUAL 0)
      string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" line "${words}")
      set(why "${found} fails: ${line}")
      message(WARNING "qlora_native: no CUDA kernels are built, because ${found} cannot compile and link an empty "
                      "program (${status}):\n${words}")
    endif()
  else()
    set(found "")
    set(why "no nvcc was found")
    find_program(nvidia_smi nvidia-smi NO_CACHE)
    if(nvidia_smi)
      numbers_printed_by(cards ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader)
    endif()
    if(cards)
      message(WARNING "qlora_native: no CUDA kernels are built: there is a GPU, but no nvcc. Put one on PATH or set "
                      "CUDACXX; pip brings one by itself for drivers from 580 on, unless --no-build-isolation is given.")
    endif()
  endif()
  set(${nvcc} "${found}" PARENT_SCOPE)
  set(${lacking} "${why}" PARENT_SCOPE)
endfunction()
