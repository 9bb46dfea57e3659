# Cross-compiles with the package `ziglang` for zig_target, for the toolchain files beside this one. Only tried as far as
# that everything compiles and links: nothing that it makes was ever run on such a machine.
set(CMAKE_CXX_COMPILER python3 -m ziglang c++ -target ${zig_target})
foreach(tool ar ranlib)  # CMake takes no arguments for these
  string(TOUPPER ${tool} name)
  set(CMAKE_${name} ${CMAKE_BINARY_DIR}/zig-${tool})
  file(WRITE ${CMAKE_${name}} "#!/bin/sh\nexec python3 -m ziglang ${tool} \"$@\"\n")
  file(CHMOD ${CMAKE_${name}} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
endforeach()
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
