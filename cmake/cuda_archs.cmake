# Which GPU architectures to compile for. Included by cuda.cmake, and run by itself in tests/test_build_options.py.

# The numbers in what a command prints; dots are left out: 8.9 is 89.
function(numbers_printed_by result)
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE printed ERROR_QUIET RESULT_VARIABLE status)
  set(numbers "")
  if(status EQUAL 0)
    string(REPLACE "." "" printed "${printed}")
    string(REGEX MATCHALL "[0-9]+" numbers "${printed}")
  endif()
  set(${result} "${numbers}" PARENT_SCOPE)
endfunction()

# `wanted` is a list of architectures, `all`, or nothing: then those of the GPUs in sight, or all if there are none.
# All are those that the project supports and this nvcc supports. In rising order; empty if nvcc supports none.
function(choose_cuda_archs result nvcc wanted)
  set(chosen ${wanted})
  if(NOT wanted OR wanted STREQUAL "all")
    numbers_printed_by(known ${nvcc} --list-gpu-code)
    set(chosen "")
    foreach(arch 75 80 86 89 90 100 120)
      if(arch IN_LIST known)
        list(APPEND chosen ${arch})
      endif()
    endforeach()
  endif()
  find_program(nvidia_smi nvidia-smi NO_CACHE)
  if(nvidia_smi AND NOT wanted)
    numbers_printed_by(in_sight ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader)
    set(of_gpus ${in_sight})
    list(FILTER of_gpus EXCLUDE REGEX "^([0-6].|7[0-4])$")  # too old for the kernels
    foreach(arch ${of_gpus})
      if(NOT arch IN_LIST known)  # newer than this nvcc: such a card runs the PTX of the newest that nvcc supports
        set(of_gpus "")
      endif()
    endforeach()
    if(of_gpus)
      set(chosen ${of_gpus})
    endif()
  endif()
  list(REMOVE_DUPLICATES chosen)
  list(SORT chosen COMPARE NATURAL)
  set(${result} "${chosen}" PARENT_SCOPE)
endfunction()

# Which of these, in rising order, are compiled to PTX too: the newest, for the cards that come after it, and 80 where
# capability 11.0 would find nothing else: it is of a major version of its own, and below the newest.
function(choose_cuda_ptx result)
  list(GET ARGN -1 chosen)
  if(chosen GREATER 110 AND 80 IN_LIST ARGN AND NOT 110 IN_LIST ARGN)
    list(PREPEND chosen 80)
  endif()
  set(${result} "${chosen}" PARENT_SCOPE)
endfunction()
