// Passes over all tokens.
#pragma once

#include "compiler/syntax.h"

namespace softmetal {

// Hints whose arguments the preprocessor leaves unexpanded, on which a second pass fails.
void drop_pragmas(Syntax& syntax);
// clang's own stay, and those of C++; Metal's have served.
void drop_attributes(Syntax& syntax);
// Literals of half, bfloat and float as C++ has them, and static_cast between half and bfloat; one
// to a pointer or reference stays if its address spaces are to be checked.
void replace_literals(Syntax& syntax, bool keeps_pointers);
// Errors where words of C++ are used that Metal lacks.
void refuse_words(Syntax& syntax);

}  // namespace softmetal
