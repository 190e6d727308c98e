# A build for other machines than this one (tools/wheel.py): it needs old symbols only (pins.h, missing.cpp, start.cpp), and
# finds ExecuTorch's libraries as a wheel that is installed beside moec has them.
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(FATAL_ERROR "MOEC_PORTABLE is for Linux")
endif()
set(moec_portable_dir ${CMAKE_CURRENT_LIST_DIR})
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
# ExecuTorch's targets add the folder where it lies on this machine
foreach(name runtime threadpool kernels_optimized backend_xnnpack)
  get_target_property(options executorch::${name} INTERFACE_LINK_OPTIONS)
  list(FILTER options EXCLUDE REGEX "-rpath,")
  set_target_properties(executorch::${name} PROPERTIES INTERFACE_LINK_OPTIONS "${options}")
endforeach()
set(CMAKE_INSTALL_RPATH "$ORIGIN;$ORIGIN/../../../executorch/lib")
add_compile_options("SHELL:-include ${moec_portable_dir}/pins.h")
add_link_options(-Wl,--strip-all)

add_library(moec_portable OBJECT ${moec_portable_dir}/missing.cpp)
set_target_properties(moec_portable PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_STANDARD 17)

# before glibc 2.34 threads are in a library of their own
function(moec_make_portable)
  foreach(target IN LISTS ARGN)
    target_link_libraries(${target} PRIVATE moec_portable -Wl,--push-state,--no-as-needed -l:libpthread.so.0 -Wl,--pop-state)
  endforeach()
  target_sources(moec_runner PRIVATE ${moec_portable_dir}/start.cpp)
  target_link_options(moec_runner PRIVATE -Wl,--wrap=__libc_start_main)
endfunction()
