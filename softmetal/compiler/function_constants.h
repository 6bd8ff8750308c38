// Function constants, which get their values when a library is opened.
#pragma once

#include <set>
#include <string>

#include "compiler/syntax.h"

namespace softmetal {

class FunctionConstants {
 public:
  // `strict`: the text is for the check of address spaces.
  FunctionConstants(Syntax& syntax, bool strict) : syntax_(syntax), strict_(strict) {}

  // Their names have to be known before the first use.
  void find();
  // constant T name [[function_constant(i)]];
  void declare(Index begin, Index end, const Attribute& attribute);
  // A constant made from function constants is not known to the compiler.
  void derive(Index begin, Index end);

 private:
  Syntax& syntax_;
  const bool strict_;
  std::set<std::string> names_;
};

}  // namespace softmetal
