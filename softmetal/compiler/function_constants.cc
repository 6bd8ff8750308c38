#include "compiler/function_constants.h"

#include <vector>

namespace softmetal {

void FunctionConstants::find() {
  for (Index i = 0; i < syntax_.size(); ++i) {
    if (syntax_.token(i).blank() || !syntax_.opens_attribute(i)) continue;
    std::vector<Attribute> all;
    syntax_.read_attributes(syntax_.next(i) + 1, syntax_.partner(syntax_.next(i)), &all);
    const Index end = syntax_.partner(i);
    if (Syntax::find(all, "function_constant") && syntax_.at(syntax_.next(end), ";") &&
        syntax_.identifier(syntax_.previous(i))) {
      names_.insert(syntax_.token(syntax_.previous(i)).text);
    }
    i = end;
  }
  for (Index i = 0; i < syntax_.size(); ++i) {
    if (!syntax_.at(i, "is_function_constant_defined") || !syntax_.at(syntax_.next(i), "(")) {
      continue;
    }
    const Index close = syntax_.partner(syntax_.next(i));
    syntax_.token(syntax_.previous(close)).text += "_softmetal_defined";
    syntax_.token(i).text = "bool";
  }
}

void FunctionConstants::declare(Index begin, Index end, const Attribute& attribute) {
  Index attributes_begin = begin;
  while (!syntax_.opens_attribute(attributes_begin)) {
    attributes_begin = syntax_.next(attributes_begin);
  }
  const Index name = syntax_.previous(attributes_begin);
  if (name == kNone || name < begin || !syntax_.identifier(name)) {
    syntax_.error(attributes_begin, "a function constant without a name");
    return;
  }
  std::string type;
  for (Index i = begin; i < name; i = syntax_.next(i)) {
    if (one_of(syntax_.token(i), {"constant", "constexpr", "static", "const", "inline"})) continue;
    type += (type.empty() ? "" : " ") + syntax_.token(i).text;
  }
  const std::string n = syntax_.token(name).text;
  bool is_constant = false;
  for (Index i = begin; i < name; i = syntax_.next(i)) is_constant |= syntax_.at(i, "constant");
  if (!is_constant) {
    syntax_.error(begin, "function constant '" + n + "' must be in constant address space");
  }
  syntax_.erase(begin, end);
  if (strict_) {
    syntax_.token(begin).text =
        "extern constant bool " + n + "_softmetal_defined; extern constant " + type + " " + n + ";";
    return;
  }
  syntax_.token(begin).text = "static bool " + n + "_softmetal_defined = false; static const " +
                              type + " " + n + " = softmetal::function_constant<" + type + ">(" +
                              attribute.argument + ", " + quoted(n) + ", " + quoted(type) + ", &" +
                              n + "_softmetal_defined);";
}

void FunctionConstants::derive(Index begin, Index end) {
  bool is_constant = false, derives = false;
  Index name = kNone, keyword = kNone;
  for (Index i = begin; i < end; i = syntax_.next(i)) {
    if (syntax_.at(i, "constant")) is_constant = true;
    if (syntax_.at(i, "constexpr")) keyword = i;
    if (syntax_.at(i, "=") && name == kNone) name = syntax_.previous(i);
    if (name != kNone && syntax_.identifier(i) &&
        (names_.count(syntax_.token(i).text) != 0 ||
         syntax_.token(i).text.find("_softmetal_defined") != std::string::npos)) {
      derives = true;
    }
  }
  if (!is_constant || !derives || !syntax_.identifier(name)) return;
  names_.insert(syntax_.token(name).text);
  if (keyword != kNone) syntax_.erase(keyword, keyword + 1);
}

}  // namespace softmetal
