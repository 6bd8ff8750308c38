// Work counters for products that a program adds: a * b + c, of scalars and of vectors.
#pragma once

#include <string>

namespace softmetal {

// `ir` is the LLVM text that clang makes of a kernel's C++ before any optimisation, where what a
// program wrote as one expression is still seen as such: a floating-point product that is added or
// subtracted is @llvm.fmuladd, and for vectors a call of the library's operator* whose temporary a
// call of operator+ and its kin takes. Returns the text with a call of softmetal_count after each
// of them. Functions of the library count for themselves.
std::string count_products(const std::string& ir);

}  // namespace softmetal
