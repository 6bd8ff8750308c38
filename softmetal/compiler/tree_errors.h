// What the syntax tree shows that C++ for OpenCL takes for right and Metal does not.
//
// Pointers and references that a program declares without an address space: they are generic, of
// any space. Metal refuses such pointers, and takes such references for references to memory of the
// thread. And lambda expressions, which Metal has since 3.2.
#pragma once

#include <istream>
#include <string>
#include <vector>

namespace softmetal {

struct TreeError {
  std::string file;
  unsigned line = 0, column = 0;
  std::string message;
  bool is_declared = false;  // by a declaration, whose type may be deduced
};

// `tree` is what clang -ast-dump writes. Declarations in files whose name begins with `library` are
// not the program's.
std::vector<TreeError> find_tree_errors(std::istream& tree, const std::string& library,
                                        bool has_lambdas);

}  // namespace softmetal
