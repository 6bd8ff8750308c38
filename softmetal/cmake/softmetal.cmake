# softmetal_add_library(TARGET OUTPUT FILE.metallib SOURCE FILE.metal [DEPENDS FILE...]
#                       [OPTIONS OPTION...])
# compiles Metal ahead of time. A host program finds the file as its default library where it is
# called default.metallib and lies beside the program.
function(softmetal_add_library target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "OUTPUT;SOURCE" "DEPENDS;OPTIONS")
  foreach(needed OUTPUT SOURCE)
    if(NOT arg_${needed})
      message(FATAL_ERROR "softmetal_add_library(${target}): ${needed} is missing")
    endif()
  endforeach()
  get_filename_component(source ${arg_SOURCE} ABSOLUTE)
  get_filename_component(output ${arg_OUTPUT} ABSOLUTE BASE_DIR ${CMAKE_CURRENT_BINARY_DIR})
  add_custom_command(OUTPUT ${output}
                     COMMAND softmetal_program compile ${source} -o ${output} ${arg_OPTIONS}
                     DEPENDS softmetal_program ${source} ${arg_DEPENDS}
                     VERBATIM)
  add_custom_target(${target} ALL DEPENDS ${output})
endfunction()
