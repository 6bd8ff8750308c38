// Kernels and what registers them with the executor.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "compiler/kernel_parameters.h"
#include "compiler/syntax.h"

namespace softmetal {

class Kernels {
 public:
  // `strict`: the text is for the check of address spaces, and registers nothing.
  Kernels(Syntax& syntax, bool strict) : syntax_(syntax), strict_(strict) {}

  // Whether the declaration [begin, end), which has the attributes `all`, is one of a kernel.
  bool is_kernel(Index begin, Index end, const std::vector<Attribute>& all) const;
  // Notes a kernel, its declaration or its instantiation. Of a kernel with a body: what names it
  // as a template argument inside of that body; else nothing.
  std::string declare(Index begin, Index end, Index body, bool is_function,
                      const std::string& scope, const std::vector<Attribute>& all);
  // The text that registers them.
  std::string registrations() const;

 private:
  struct Kernel {
    std::vector<KernelParameter> parameters;
    bool has_thread_limit = false;
  };

  struct Registration {
    std::string host_name, function;  // function: with template arguments
    std::string definition;           // qualified name, key of the kernels
    std::string limit_function;       // gives the thread limit, where there is one
  };

  bool declarator(Index begin, Index end, Index* first, Index* last, Index* open) const;
  std::string template_arguments(Index open) const;

  Syntax& syntax_;
  const bool strict_;
  std::map<std::string, Kernel> kernels_;
  std::vector<Registration> registrations_;
};

}  // namespace softmetal
