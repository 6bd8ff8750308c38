#include "compiler/rewriter.h"

#include <set>

#include "compiler/function_constants.h"
#include "compiler/kernels.h"
#include "compiler/methods.h"
#include "compiler/passes.h"
#include "compiler/syntax.h"
#include "compiler/threadgroup_variables.h"

namespace softmetal {
namespace {

class Rewriter : private Syntax {
 public:
  Rewriter(const std::string& text, const std::string& name, Purpose purpose)
      : Syntax(text, name, purpose == Purpose::kAddressSpaces),
        strict_(purpose == Purpose::kAddressSpaces),
        kernels_(*this, strict_),
        constants_(*this, strict_),
        methods_(*this) {}

  Rewritten run() {
    drop_pragmas(*this);
    if (errors_.empty()) {
      constants_.find();
      declarations(0, tokens_.size(), "", "");
      if (strict_) {
        methods_.qualify();
        refer_to_functions(*this);
      } else {
        erase_qualifiers();
      }
      drop_attributes(*this);
      replace_literals(*this, strict_);
      refuse_words(*this);
    }
    Rewritten out;
    for (const Token& token : tokens_) out.text += token.text;
    if (!strict_) out.text += kernels_.registrations();
    out.errors = std::move(errors_);
    return out;
  }

 private:
  // Past the declaration that begins at i. `body` is its last { at the outermost level, or kNone.
  Index declaration_end(Index i, Index end, Index* body, bool* is_function) const {
    *body = kNone;
    *is_function = false;
    bool closed = false, defined = false, initialisers = false, is_class = false;
    for (Index j = i; j < end; ++j) {
      const Token& token = tokens_[j];
      if (token.blank()) continue;
      if (token.is(";")) return j + 1;
      if (token.is("template") && at(next(j), "<")) {
        const Index close = closing_angle(next(j), end);
        if (close != kNone) {
          j = close;
          continue;
        }
      }
      if (token.is("(") || token.is("[")) {
        closed |= token.is("(") && !opens_attribute(j);
        j = partner_[j];
      } else if (token.is("=") && !at(previous(j), "operator")) {
        defined = true;
      } else if (token.is(":") && closed) {
        initialisers = true;
      } else if (one_of(token, {"struct", "class", "union", "enum"}) && !closed) {
        is_class = true;
      } else if (token.is("{")) {
        const Index before = previous(j);
        if (initialisers && (identifier(before) || at(before, ">")) &&
            !is_address_space(tokens_[before])) {
          j = partner_[j];  // member{value}
          continue;
        }
        *body = j;
        *is_function = closed && !defined && !(is_class && !closed);
        j = partner_[j];
        if (*is_function) return j + 1;
      }
    }
    return end;
  }

  // `in_class`: the name of the class whose members these are, or nothing.
  void declarations(Index begin, Index end, const std::string& scope, const std::string& in_class) {
    std::set<std::string> seen;
    for (Index i = next(begin - 1); i < end;) {
      if (at(i, ";") || at(i, "}")) {
        i = next(i);
        continue;
      }
      if (!in_class.empty() && one_of(tokens_[i], {"public", "private", "protected"}) &&
          at(next(i), ":")) {
        i = next(next(i));
        continue;
      }
      const Index space = at(i, "inline") ? next(i) : i;
      if (at(space, "namespace") ||
          (at(i, "extern") && tokens_[next(i)].kind == TokenKind::kString)) {
        Index open = space;
        std::string name;
        while (open < end && !at(open, "{") && !at(open, ";")) {
          if (identifier(open) && !at(open, "namespace")) name += tokens_[open].text + "::";
          open = next(open);
        }
        if (at(space, "namespace") && at(open, "{")) {
          declarations(open + 1, partner_[open], scope + name, "");
          i = next(partner_[open]);
          continue;
        }
        if (at(open, "{")) {
          declarations(open + 1, partner_[open], scope, "");
          i = next(partner_[open]);
          continue;
        }
      }
      Index body = kNone;
      bool is_function = false;
      const Index last = declaration_end(i, end, &body, &is_function);
      declaration(i, last, body, is_function, scope, in_class, &seen);
      i = next(last - 1);
    }
  }

  void declaration(Index begin, Index end, Index body, bool is_function, const std::string& scope,
                   const std::string& in_class, std::set<std::string>* seen) {
    if (!strict_ && drop_if_known(begin, end, body, is_function, seen)) return;
    const std::vector<Attribute> all = attributes(begin, is_function ? body : end);
    std::string kernel;
    if (kernels_.is_kernel(begin, is_function ? body : end, all)) {
      kernel = kernels_.declare(begin, end, body, is_function, scope, all);
    } else if (const Attribute* constant = find(all, "function_constant");
               constant && !is_function) {
      constants_.declare(begin, end, *constant);
      return;
    } else if (!is_function && body != kNone && has_class_body(begin, body)) {
      declarations(body + 1, partner_[body], scope, methods_.class_name(begin, body));
    } else if (strict_) {
      methods_.find(begin, is_function ? body : end, in_class);
    }
    if (is_function) {
      place_threadgroup_variables(*this, body, partner_[body], kernel, strict_);
    } else if (in_class.empty()) {
      constants_.derive(begin, end);
    }
  }

  bool has_class_body(Index begin, Index body) const {
    for (Index i = begin; i < body; i = next(i)) {
      if (at(i, "template") && at(next(i), "<")) {
        const Index close = closing_angle(next(i), body);
        if (close != kNone) i = close;
      }
      if (at(i, "=")) return false;
      if (one_of(tokens_[i], {"struct", "class", "union"})) return true;
    }
    return false;
  }

  // Functions and specialisations that differ in address spaces alone are one in C++: the first
  // stays.
  bool drop_if_known(Index begin, Index end, Index body, bool is_function,
                     std::set<std::string>* seen) {
    const bool specialises = body != kNone && !is_function && has_class_body(begin, body);
    const bool declares =
        body == kNone && end > begin && at(end - 1, ";") && has_parentheses(begin, end);
    if (!is_function && !specialises && !declares) return false;
    std::string key = is_function ? "f:" : specialises ? "c:" : "d:";
    bool qualified = false;
    std::string last;
    for (Index i = begin; i < (body == kNone ? end : body); ++i) {
      const Token& token = tokens_[i];
      if (token.blank()) continue;
      std::string part = token.text;
      if (is_address_space(token)) {
        qualified = true;
        // As a method's qualifier it is nothing, else `constant` is const.
        if (part != "constant" || at(previous(i), ")")) continue;
        part = "const";
      }
      if (part == "const" && last == "const") continue;
      key += part + " ";
      last = part;
    }
    if (seen->insert(key).second || !qualified) return false;
    erase(begin, end);
    return true;
  }
  bool has_parentheses(Index begin, Index end) const {
    for (Index i = begin; i < end; ++i) {
      if (at(i, "=")) return false;
      if (at(i, "(")) return true;
    }
    return false;
  }

  void erase_qualifiers() {
    for (Index i = 0; i < tokens_.size(); ++i) {
      Token& token = tokens_[i];
      if (!is_address_space(token)) continue;
      const Index before = previous(i);
      if (before != kNone && one_of(tokens_[before], {"::", ".", "->"})) continue;
      const bool method =
          at(before, ")") && (at(next(i), "{") || at(next(i), ";") || at(next(i), ":") ||
                              at(next(i), "const") || at(next(i), "noexcept"));
      const bool after_const = at(before, "const") && at(previous(before), ")");
      token.text = token.is("constant") && !method && !after_const ? "const" : "";
    }
  }

  const bool strict_;
  Kernels kernels_;
  FunctionConstants constants_;
  Methods methods_;
};

}  // namespace

Rewritten rewrite(const std::string& preprocessed, const std::string& source_name,
                  Purpose purpose) {
  return Rewriter(preprocessed, source_name, purpose).run();
}

}  // namespace softmetal
