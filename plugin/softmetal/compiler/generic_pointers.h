// Pointers and references that a program declares without an address space.
#pragma once

#include <istream>
#include <string>
#include <vector>

namespace softmetal {

struct GenericPointer {
  std::string file;
  unsigned line = 0, column = 0;
  std::string message;
};

// `tree` is what clang -ast-dump writes. Declarations in files whose name begins with `library` are
// not the program's.
std::vector<GenericPointer> find_generic_pointers(std::istream& tree, const std::string& library);

}  // namespace softmetal
