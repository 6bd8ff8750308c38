// Threadgroup variables of functions: storage that all threads of a threadgroup share.
#pragma once

#include <string>

#include "compiler/syntax.h"

namespace softmetal {

// `threadgroup T x[N], y;` in the function body [begin, end) becomes references to that storage.
// `kernel` names the kernel as a template argument, where the body is a kernel's; `strict`: the
// text is for the check of address spaces.
void place_threadgroup_variables(Syntax& syntax, Index begin, Index end, const std::string& kernel,
                                 bool strict);

}  // namespace softmetal
