// What the check of address spaces needs to know of classes.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "compiler/syntax.h"

namespace softmetal {

// A method that names no address space works on objects of the thread: `this` gets a qualifier
// after the parameters. Constructors of the thread's objects make values that have no space yet.
class Methods {
 public:
  explicit Methods(Syntax& syntax) : syntax_(syntax) {}

  // The name of the class whose members are between braces at `body`.
  std::string class_name(Index begin, Index body) const;
  // Looks at a declaration, one of `in_class` unless that is empty.
  void find(Index begin, Index end, const std::string& in_class);
  // Changes those that were found.
  void qualify();

 private:
  void add(Index open, Index end, Index name, const std::string& in_class);

  Syntax& syntax_;
  std::set<std::string> classes_;  // those with methods
  std::vector<Index> methods_;     // the ends of their parameters
};

// Template parameters that are pointers to functions become references: OpenCL gives pointers to
// functions an address space, which no function's address has.
void refer_to_functions(Syntax& syntax);

}  // namespace softmetal
