#include "compiler/methods.h"

namespace softmetal {

std::string Methods::class_name(Index begin, Index body) const {
  std::string name;
  for (Index i = begin; i < body; i = syntax_.next(i)) {
    if (syntax_.at(i, "template") && syntax_.at(syntax_.next(i), "<")) {
      const Index close = syntax_.closing_angle(syntax_.next(i), body);
      if (close != kNone) i = close;
    } else if (syntax_.opens_attribute(i)) {
      i = syntax_.partner(i);
    } else if (syntax_.at(i, "alignas") || syntax_.at(i, "__attribute__")) {
      i = syntax_.skip_parentheses(i);
    } else if (syntax_.at(i, ":") || syntax_.at(i, "<")) {
      break;
    } else if (syntax_.identifier(i) &&
               !one_of(syntax_.token(i), {"struct", "class", "union", "final"})) {
      name = syntax_.token(i).text;
    }
  }
  return name.empty() ? "(unnamed)" : name;
}

void Methods::find(Index begin, Index end, const std::string& in_class) {
  Index name = kNone;
  for (Index i = begin; i < end; i = syntax_.next(i)) {
    if (syntax_.at(i, "template") && syntax_.at(syntax_.next(i), "<")) {
      const Index close = syntax_.closing_angle(syntax_.next(i), end);
      if (close == kNone) return;
      i = close;
    } else if (syntax_.opens_attribute(i)) {
      i = syntax_.partner(i);
    } else if (syntax_.at(i, "alignas") || syntax_.at(i, "decltype") ||
               syntax_.at(i, "__attribute__")) {
      i = syntax_.skip_parentheses(i);
    } else if (one_of(syntax_.token(i),
                      {"static", "friend", "using", "typedef", "=", "static_assert"})) {
      return;
    } else if (syntax_.at(i, "operator")) {
      name = i;
      while (i < end &&
             (i == name || !syntax_.at(i, "(") || syntax_.at(syntax_.previous(i), "operator"))) {
        i = syntax_.at(i, "(") ? syntax_.next(syntax_.partner(i)) : syntax_.next(i);
      }
      add(i, end, name, in_class);
      return;
    } else if (syntax_.at(i, "(")) {
      if (name != kNone) add(i, end, name, in_class);
      return;
    } else if (syntax_.identifier(i)) {
      name = i;
    } else if (syntax_.at(i, "<")) {
      const Index close = syntax_.closing_angle(i, end);
      if (close == kNone) return;
      i = close;
    } else if (!syntax_.at(i, "::") && !syntax_.at(i, "~")) {
      name = kNone;
    }
  }
}

void Methods::add(Index open, Index end, Index name, const std::string& in_class) {
  if (open >= end || !syntax_.at(open, "(") || syntax_.at(syntax_.previous(name), "~")) return;
  std::string class_of = in_class;
  if (in_class.empty()) {  // defined outside of its class
    if (!syntax_.at(syntax_.previous(name), "::")) return;
    Index i = syntax_.previous(syntax_.previous(name));
    if (syntax_.at(i, ">")) {
      while (i > 0 && !syntax_.at(i, "<")) i = syntax_.previous(i);
      i = syntax_.previous(i);
    }
    if (!syntax_.identifier(i) || classes_.count(syntax_.token(i).text) == 0) return;
    class_of = syntax_.token(i).text;
  }
  classes_.insert(class_of);
  const bool constructs = syntax_.token(name).text == class_of;
  const Index parameters = syntax_.partner(open);
  for (Index i = syntax_.next(parameters); i < end && !syntax_.at(i, "->") && !syntax_.at(i, ":");
       i = syntax_.next(i)) {
    if (constructs && syntax_.at(i, "thread")) syntax_.erase(i, i + 1);
    if (syntax_.at(i, "constant"))
      syntax_.token(i).text = "__constant";  // elsewhere it is const, too
    if (is_address_space(syntax_.token(i)) || syntax_.at(i, "__constant")) return;
  }
  if (constructs) return;
  methods_.push_back(parameters);
}

void Methods::qualify() {
  for (const Index close : methods_) syntax_.token(close).text += " thread";
}

void refer_to_functions(Syntax& syntax) {
  for (Index i = 0; i < syntax.size(); ++i) {
    if (!syntax.at(i, "template") || !syntax.at(syntax.next(i), "<")) continue;
    const Index close = syntax.closing_angle(syntax.next(i), syntax.size());
    if (close == kNone) continue;
    for (; i < close; i = syntax.next(i)) {
      if (!syntax.at(i, "(") || !syntax.at(syntax.next(i), "*")) continue;
      const Index star = syntax.next(i), end = syntax.partner(i);
      const Index name = syntax.next(star);
      if (!syntax.at(syntax.next(end), "(")) continue;
      if (name == end || syntax.next(name) == end) syntax.token(star).text = "&";
    }
  }
}

}  // namespace softmetal
