#include "compiler/threadgroup_variables.h"

#include <optional>
#include <utility>

namespace softmetal {
namespace {

class ThreadgroupVariables {
 public:
  ThreadgroupVariables(Syntax& syntax, std::string kernel, bool strict)
      : syntax_(syntax), kernel_(std::move(kernel)), strict_(strict) {}

  void place(Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      if (!syntax_.at(i, "threadgroup")) continue;
      Index first = i;
      std::string alignment;
      Index before = syntax_.previous(i);
      if (syntax_.at(before, ")") &&
          syntax_.at(syntax_.previous(syntax_.partner(before)), "alignas")) {
        alignment = syntax_.text(syntax_.partner(before) + 1, before);
        first = syntax_.previous(syntax_.partner(before));
        before = syntax_.previous(first);
      }
      if (!syntax_.at(before, ";") && !syntax_.at(before, "{") && !syntax_.at(before, "}") &&
          !syntax_.at(before, ":")) {
        continue;
      }
      const std::optional<Index> semicolon = variable(first, i, end, alignment);
      if (semicolon) i = *semicolon;
    }
  }

 private:
  // The declaration whose qualifier this is, from `first`; its semicolon, or nothing where it is
  // none of variables.
  std::optional<Index> variable(Index first, Index qualifier, Index end, std::string alignment) {
    Index i = syntax_.next(qualifier);
    const Index type_begin = i;
    if (syntax_.at(i, "alignas") && syntax_.at(syntax_.next(i), "(")) {
      alignment = syntax_.text(syntax_.next(i) + 1, syntax_.partner(syntax_.next(i)));
      i = syntax_.next(syntax_.partner(syntax_.next(i)));
      syntax_.erase(type_begin, i);
    }
    const Index type_end = after_type(i, end);
    if (type_end == kNone || !syntax_.identifier(type_end)) return std::nullopt;
    i = type_end;
    const std::string type = syntax_.text(type_begin, type_end);
    std::string out;
    while (true) {
      if (!syntax_.identifier(i)) return std::nullopt;
      const std::string name = syntax_.token(i).text;
      Index after = syntax_.next(i);
      const Index extents = after;
      while (syntax_.at(after, "[")) after = syntax_.next(syntax_.partner(after));
      if (!syntax_.at(after, ",") && !syntax_.at(after, ";")) {
        if (!syntax_.at(after, "=") && !syntax_.at(after, "{")) return std::nullopt;
        syntax_.error(i, "threadgroup variable '" + name + "' cannot be initialized");
        return std::nullopt;
      }
      const std::string t = name + "_softmetal_type";
      if (strict_) {
        out += "using " + t + " = " + type + " " + syntax_.text(extents, after) + "; threadgroup " +
               t + "& " + name + " = softmetal::threadgroup_variable<" + t + ">(); ";
      } else {
        out += "using " + t + " = " + type + " " + syntax_.text(extents, after) + "; static char " +
               name + "_softmetal_id; " + t + "& " + name + " = softmetal::threadgroup_variable<" +
               t + ">(&" + name + "_softmetal_id, \"" + name + "\"" +
               (alignment.empty() ? "" : ", (" + alignment + ")") + "); ";
        if (!kernel_.empty()) {
          out += "static_cast<void>(&softmetal::StaticVariable<" + kernel_ + ", &" + name +
                 "_softmetal_id, sizeof(" + t + ")>::is_declared); ";
        }
      }
      i = syntax_.next(after);
      if (syntax_.at(after, ";")) {
        syntax_.erase(first, after + 1);
        syntax_.token(first).text = out;
        return after;
      }
    }
  }

  // Past the names and template arguments of a type at i; kNone where there is something else.
  Index after_type(Index i, Index end) const {
    while (i < end) {
      if (syntax_.at(i, "const") || syntax_.at(i, "volatile") || syntax_.at(i, "typename") ||
          syntax_.at(i, "struct")) {
        i = syntax_.next(i);
        continue;
      }
      if (!syntax_.identifier(i)) return kNone;
      const bool part = one_of(syntax_.token(i), {"unsigned", "signed", "long", "short"});
      i = syntax_.next(i);
      if (syntax_.at(i, "<")) {
        const Index close = syntax_.closing_angle(i, end);
        if (close == kNone) return kNone;
        i = syntax_.next(close);
      }
      if (syntax_.at(i, "::")) {
        i = syntax_.next(i);
        if (syntax_.at(i, "template")) i = syntax_.next(i);
        continue;
      }
      if (part && one_of(syntax_.token(i), {"int", "char", "short", "long", "unsigned"})) continue;
      return i;
    }
    return kNone;
  }

  Syntax& syntax_;
  const std::string kernel_;
  const bool strict_;
};

}  // namespace

void place_threadgroup_variables(Syntax& syntax, Index begin, Index end, const std::string& kernel,
                                 bool strict) {
  ThreadgroupVariables(syntax, kernel, strict).place(begin, end);
}

}  // namespace softmetal
