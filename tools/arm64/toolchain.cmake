# Builds for Linux on arm64 with Debian's cross compiler, whose C++ library goes into the plugin: older
# systems have an older one.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(CMAKE_C_COMPILER aarch64-linux-gnu-gcc REQUIRED)
find_program(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++ REQUIRED)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)

set(CMAKE_MODULE_LINKER_FLAGS_INIT
    "-static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections -Wl,--wrap=pthread_once,--wrap=pthread_create,--wrap=pthread_detach")
get_filename_component(old_glibc ${CMAKE_CURRENT_LIST_DIR}/../../build/arm64/old_glibc.o ABSOLUTE)
set(CMAKE_CXX_STANDARD_LIBRARIES_INIT ${old_glibc})
