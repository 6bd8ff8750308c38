# The Metal host code, in the plugin itself: macOS.
enable_language(OBJCXX)
set(shader_sources ${CMAKE_CURRENT_BINARY_DIR}/metal/shader_sources.h)
file(GLOB shader_files CONFIGURE_DEPENDS shaders/*.metal shaders/*.h)
add_custom_command(
  OUTPUT ${shader_sources}
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/plugin/metal/embed_shaders.py
          ${CMAKE_CURRENT_SOURCE_DIR}/shaders ${shader_sources}
  DEPENDS plugin/metal/embed_shaders.py ${shader_files}
  VERBATIM)
include(plugin/metal/sources.cmake)
list(TRANSFORM host_sources PREPEND plugin/metal/ OUTPUT_VARIABLE metal_sources)
set_source_files_properties(${metal_sources} PROPERTIES COMPILE_OPTIONS -fobjc-arc)
set_target_properties(_plugin PROPERTIES
                      OBJCXX_STANDARD 20 OBJCXX_STANDARD_REQUIRED ON OBJCXX_EXTENSIONS OFF
                      OBJCXX_VISIBILITY_PRESET hidden)
target_sources(_plugin PRIVATE ${metal_sources} ${shader_sources})
target_include_directories(_plugin PRIVATE shaders ${CMAKE_CURRENT_BINARY_DIR})
target_link_libraries(_plugin PRIVATE "-framework Foundation" "-framework Metal")
# Python looks for this symbol alone.
target_link_options(_plugin PRIVATE LINKER:-exported_symbol,_PyInit__plugin)
