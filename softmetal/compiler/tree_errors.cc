#include "compiler/tree_errors.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

namespace softmetal {
namespace {

// Where clang's dump of a syntax tree is: it writes of a location only what differs from the one
// before.
class Place {
 public:
  // Reads a location at the beginning of `text`; what follows it is left. False where there is
  // none.
  bool read(std::string_view* text) {
    const size_t end = text->find_first_of(",> ", text->rfind("<scratch space>", 0) == 0 ? 15 : 0);
    std::string_view word = text->substr(0, end);
    if (word.rfind("<invalid", 0) == 0) {
      text->remove_prefix(std::min(text->size(), std::string_view("<invalid sloc>").size()));
      return true;
    }
    unsigned column = 0, line = line_;
    if (!cut_number(&word, &column)) return false;
    if (word != "col") {
      if (!cut_number(&word, &line)) return false;
      if (word != "line") file_ = word;
    }
    line_ = line;
    column_ = column;
    text->remove_prefix(std::min(end, text->size()));
    return true;
  }
  const std::string& file() const { return file_; }
  unsigned line() const { return line_; }
  unsigned column() const { return column_; }

 private:
  // Takes ":12" off the end.
  static bool cut_number(std::string_view* word, unsigned* number) {
    const size_t colon = word->rfind(':');
    if (colon == std::string_view::npos || colon + 1 == word->size()) return false;
    const std::string_view digits = word->substr(colon + 1);
    if (!std::all_of(digits.begin(), digits.end(),
                     [](unsigned char c) { return std::isdigit(c); })) {
      return false;
    }
    *number = static_cast<unsigned>(std::strtoul(std::string(digits).c_str(), nullptr, 10));
    word->remove_suffix(digits.size() + 1);
    return true;
  }

  std::string file_;
  unsigned line_ = 0, column_ = 0;
};

bool contains(std::string_view text, std::string_view what) {
  return text.find(what) != std::string_view::npos;
}
bool ends_with(std::string_view text, std::string_view what) {
  return text.size() >= what.size() && text.substr(text.size() - what.size()) == what;
}

// The first type between quotes; the one behind its aliases.
std::string_view type_of(std::string_view line) {
  const size_t first = line.find('\'');
  if (first == std::string_view::npos) return {};
  size_t end = line.find('\'', first + 1);
  size_t begin = first + 1;
  if (line.substr(end, 3) == "':'") {
    begin = end + 3;
    end = line.find('\'', begin);
  }
  return line.substr(begin, end == std::string_view::npos ? end : end - begin);
}

bool has_word(std::string_view text, std::string_view word) {
  for (size_t at = 0; (at = text.find(word, at)) != std::string_view::npos; at += word.size()) {
    const bool begins = at == 0 || text[at - 1] == ' ';
    const bool ends = at + word.size() == text.size() || text[at + word.size()] == ' ';
    if (begins && ends) return true;
  }
  return false;
}

// Whether what a * of the type points to is generic: "__generic T *", not "__generic T &", and not
// "(__generic *)", a pointer to a function.
bool has_generic_pointer(std::string_view type) {
  static constexpr std::string_view kGeneric = "__generic ";
  for (size_t at = 0; (at = type.find(kGeneric, at)) != std::string_view::npos;) {
    const bool of_function = at > 0 && type[at - 1] == '(';
    at += kGeneric.size();
    int angles = 0;
    size_t end = at;
    for (; end < type.size(); ++end) {
      if (type[end] == '<') ++angles;
      if (type[end] == '>') --angles;
      if (angles == 0 && (type[end] == '*' || type[end] == '&' || type[end] == ',')) break;
    }
    if (end < type.size() && type[end] == '*' && !of_function) return true;
  }
  return false;
}

// Of an object of the type, as Metal calls it: device, threadgroup or nothing.
std::string_view space_of(std::string_view type) {
  const size_t star = type.rfind('*');
  const std::string_view own =
      star == std::string_view::npos ? type.substr(0, type.find('<')) : type.substr(star);
  if (contains(own, "__global")) return "device";
  if (contains(own, "__local")) return "threadgroup";
  return {};
}

// "0x55d0" after `before`; empty where there is none.
std::string_view address_after(std::string_view line, std::string_view before) {
  const size_t at = line.find(before);
  if (at == std::string_view::npos) return {};
  line.remove_prefix(at + before.size());
  return line.substr(0, line.find_first_of(" '"));
}

struct Node {
  size_t depth;
  std::string kind;
  std::string callee;  // of a call: the address of the function's declaration
};

class Search {
 public:
  Search(const std::string& library, bool has_lambdas)
      : library_(library), has_lambdas_(has_lambdas) {}

  void read(const std::string& whole) {
    // | `-ParmVarDecl 0x55 <file.metal:4:8, col:15> col:15 used x '__generic float *'
    std::string_view line = whole;
    const size_t depth = line.find_first_not_of(" |`-");
    if (depth == std::string_view::npos) return;
    line.remove_prefix(depth);
    while (!open_.empty() && open_.back().depth >= depth) open_.pop_back();
    if (depth <= implicit_) implicit_ = kNowhere;
    const std::string_view kind = line.substr(0, line.find(' '));
    const std::string_view address = address_after(line, " ");
    const bool was_conversion = std::exchange(after_conversion_, false);
    open_.push_back({depth, std::string(kind), ""});
    const size_t range = line.find(" <");
    if (range == std::string_view::npos || range > line.find('\'')) return;
    line.remove_prefix(range + 2);
    Place begin = place_;
    if (!begin.read(&line)) return;
    place_ = begin;
    if (line.rfind(", ", 0) == 0) {
      line.remove_prefix(2);
      place_.read(&line);
    }
    if (line.rfind("> ", 0) == 0) line.remove_prefix(2);
    if (ends_with(kind, "Decl")) {
      if (place_.read(&line)) declaration(kind, address, line);
    } else {
      expression(kind, line, begin, was_conversion);
    }
  }

  std::vector<TreeError> found;

 private:
  static constexpr size_t kNowhere = static_cast<size_t>(-1);

  bool of_library(const Place& place) const {
    return place.file().rfind(library_, 0) == 0 || place.file().rfind('<', 0) == 0;
  }

  void report(const Place& place, const std::string& message, bool is_declared = false) {
    if (!seen_.insert({place.file(), place.line(), place.column()}).second) return;
    found.push_back({place.file(), place.line(), place.column(), message, is_declared});
  }

  void declaration(std::string_view kind, std::string_view address, std::string_view line) {
    if (has_word(line.substr(0, line.find('\'')), "implicit"))
      implicit_ = std::min(implicit_, open_.back().depth);
    if (implicit_ != kNowhere || of_library(place_)) return;
    const bool is_function = kind == "FunctionDecl" || kind == "CXXMethodDecl";
    const bool is_variable = kind == "VarDecl" || kind == "ParmVarDecl" || kind == "FieldDecl" ||
                             kind == "TypedefDecl" || kind == "TypeAliasDecl";
    if (is_function) functions_.insert(std::string(address));
    if (!is_function && !is_variable) return;
    std::string_view type = type_of(line);
    if (is_function) type = type.substr(0, type.find(" ("));  // parameters come by themselves
    if (has_generic_pointer(type)) report(place_, kPointer, true);
  }

  void expression(std::string_view kind, std::string_view line, const Place& place,
                  bool was_conversion) {
    // A call's function is the first that comes below it.
    const std::string_view named = kind == "MemberExpr"    ? line.substr(line.rfind(" 0x") + 1)
                                   : kind == "DeclRefExpr" ? address_after(line, "Function ")
                                                           : std::string_view();
    const std::string_view function =
        kind == "DeclRefExpr" && named.empty() ? address_after(line, "CXXMethod ") : named;
    if (!function.empty()) {
      for (size_t i = open_.size() - 1; i-- > 0;) {
        Node& node = open_[i];
        if (node.kind == "ImplicitCastExpr" || node.kind == "ParenExpr") continue;
        if (ends_with(node.kind, "CallExpr") && node.callee.empty()) node.callee = function;
        break;
      }
    }
    if (implicit_ != kNowhere || of_library(place)) return;
    if (kind == "LambdaExpr" && !has_lambdas_) {
      report(place, "lambda expressions are not supported in Metal before 3.2");
    }
    const std::string_view type = type_of(line);
    if (was_conversion) {
      const std::string_view space = space_of(type);
      if (!space.empty()) {
        report(place, "a reference without an address space is one to thread memory, not to " +
                          std::string(space) + " memory");
      }
    }
    const bool is_cast = kind == "CStyleCastExpr" || kind == "CXXStaticCastExpr" ||
                         kind == "CXXReinterpretCastExpr" || kind == "CXXFunctionalCastExpr" ||
                         kind == "CXXConstCastExpr";
    if (is_cast && has_generic_pointer(type)) report(place, kPointer);
    after_conversion_ = kind == "ImplicitCastExpr" && contains(line, "<AddressSpaceConversion>") &&
                        contains(line, "lvalue") && binds_a_reference();
  }

  // Whether the conversion that has just been read is for a reference of the program's own: a
  // variable, a function's parameter or its result.
  bool binds_a_reference() const {
    for (size_t i = open_.size() - 1; i-- > 0;) {
      const Node& node = open_[i];
      if (node.kind == "ImplicitCastExpr" || node.kind == "ParenExpr") continue;
      if (node.kind == "VarDecl" || node.kind == "ReturnStmt") return true;
      return ends_with(node.kind, "CallExpr") && functions_.count(node.callee) != 0;
    }
    return false;
  }

  static constexpr const char* kPointer = "pointer type must have explicit address space qualifier";
  const std::string library_;
  const bool has_lambdas_;
  Place place_;
  std::vector<Node> open_;           // the node that was read last and those around it
  size_t implicit_ = kNowhere;       // the depth of a declaration that the compiler has made
  bool after_conversion_ = false;    // the next node is what is converted
  std::set<std::string> functions_;  // the program's, by address
  std::set<std::tuple<std::string, unsigned, unsigned>> seen_;
};

}  // namespace

std::vector<TreeError> find_tree_errors(std::istream& tree, const std::string& library,
                                        bool has_lambdas) {
  Search search(library, has_lambdas);
  for (std::string line; std::getline(tree, line);) search.read(line);
  return std::move(search.found);
}

}  // namespace softmetal
