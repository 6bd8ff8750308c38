// The parameters of kernels, as the text declares them.
#pragma once

#include <string>
#include <vector>

#include "compiler/syntax.h"

namespace softmetal {

struct KernelParameter {
  std::string name, type;  // type: as the source spells it
  std::string kind;        // an enumerator of ArgumentKind
  std::string address_space = "kThread";
  std::string index = "0";  // an expression
  std::string condition;    // of [[function_constant(c)]]; empty: none
  bool is_writable = false;
};

// Those between the parentheses at `open`.
std::vector<KernelParameter> read_kernel_parameters(Syntax& syntax, Index open);

}  // namespace softmetal
