// Pointers and references that a program declares without an address space. To C++ for OpenCL they
// are generic, of any space; Metal refuses such pointers, and takes such references for references
// to memory of the thread.
#pragma once

#include <istream>
#include <string>
#include <vector>

namespace softmetal {

struct GenericAddress {
  std::string file;
  unsigned line = 0, column = 0;
  std::string message;
};

// `tree` is what clang -ast-dump writes. Declarations in files whose name begins with `library` are
// not the program's.
std::vector<GenericAddress> find_generic_addresses(std::istream& tree, const std::string& library);

}  // namespace softmetal
