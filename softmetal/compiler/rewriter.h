// Metal as C++: what makes a translation unit of Metal one that clang compiles with the headers of
// msl/, and registers its kernels.
#pragma once

#include <string>
#include <vector>

namespace softmetal {

struct Rewritten {
  std::string text;
  std::vector<std::string> errors;  // in clang's form, at lines of the Metal text
};

// What the text is for: to run, where address spaces are erased and kernels registered, or for the
// check of strict_check.cc, where they stay.
enum class Purpose { kExecution, kAddressSpaces };

// `preprocessed` is the output of clang -E, with its line markers.
Rewritten rewrite(const std::string& preprocessed, const std::string& source_name,
                  Purpose purpose = Purpose::kExecution);

}  // namespace softmetal
