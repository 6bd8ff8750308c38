#include "compiler/generic_pointers.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <set>
#include <string_view>
#include <tuple>

namespace softmetal {
namespace {

// Where clang's dump of a syntax tree is: it writes of a location only what differs from the one
// before.
class Place {
 public:
  // Reads a location at the beginning of `text`; what follows it is left. False where there is none.
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
    if (!std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isdigit(c); })) {
      return false;
    }
    *number = static_cast<unsigned>(std::strtoul(std::string(digits).c_str(), nullptr, 10));
    word->remove_suffix(digits.size() + 1);
    return true;
  }

  std::string file_;
  unsigned line_ = 0, column_ = 0;
};

// The type between quotes at the end of a declaration's line; the one behind its aliases.
std::string_view type_of(std::string_view line) {
  const size_t first = line.find('\'');
  if (first == std::string_view::npos) return {};
  const size_t behind = line.find("':'", first);
  const size_t begin = behind == std::string_view::npos ? first + 1 : behind + 3;
  const size_t end = line.find('\'', begin);
  return line.substr(begin, end == std::string_view::npos ? end : end - begin);
}

bool is_word_in(std::string_view text, std::string_view word) {
  for (size_t at = 0; (at = text.find(word, at)) != std::string_view::npos; at += word.size()) {
    const bool begins = at == 0 || text[at - 1] == ' ';
    const bool ends = at + word.size() == text.size() || text[at + word.size()] == ' ';
    if (begins && ends) return true;
  }
  return false;
}

}  // namespace

std::vector<GenericPointer> find_generic_pointers(std::istream& tree, const std::string& library) {
  static constexpr std::string_view kGeneric = "__generic";
  static constexpr std::string_view kFunction = "(__generic *";  // of a pointer to a function
  std::vector<GenericPointer> out;
  std::set<std::tuple<std::string, unsigned, unsigned>> seen;
  Place place;
  size_t implicit = std::string::npos;  // the depth of a function that the compiler has made
  for (std::string whole; std::getline(tree, whole);) {
    // |-ParmVarDecl 0x55 <file.metal:4:8, col:15> col:15 used x '__generic float *'
    std::string_view line = whole;
    const size_t node = line.find_first_not_of(" |`-");
    if (node == std::string_view::npos) continue;
    if (node <= implicit) implicit = std::string::npos;
    line.remove_prefix(node);
    const std::string_view kind = line.substr(0, line.find(' '));
    const size_t open = line.find(" <");
    if (open == std::string_view::npos || open > line.find('\'')) continue;
    line.remove_prefix(open + 2);
    if (!place.read(&line)) continue;
    if (line.rfind(", ", 0) == 0) {
      line.remove_prefix(2);
      place.read(&line);
    }
    if (kind.size() < 4 || kind.substr(kind.size() - 4) != "Decl") continue;
    if (line.rfind("> ", 0) == 0) line.remove_prefix(2);
    if (!place.read(&line)) continue;
    const std::string_view before = line.substr(0, line.find('\''));
    if (is_word_in(before, "implicit")) implicit = std::min(implicit, node);
    if (implicit != std::string::npos) continue;

    const bool is_function = kind == "FunctionDecl" || kind == "CXXMethodDecl";
    const bool is_variable = kind == "VarDecl" || kind == "ParmVarDecl" || kind == "FieldDecl" ||
                             kind == "TypedefDecl" || kind == "TypeAliasDecl";
    if (!is_function && !is_variable) continue;
    std::string type(type_of(line));
    if (is_function) type.resize(std::min(type.size(), type.find(" (")));  // not the parameters
    for (size_t at = 0; (at = type.find(kFunction)) != std::string::npos;) {
      type.erase(at, kFunction.size());
    }
    if (type.find(kGeneric) == std::string::npos) continue;
    if (place.file().rfind(library, 0) == 0 || place.file().rfind('<', 0) == 0) continue;
    if (!seen.insert({place.file(), place.line(), place.column()}).second) continue;
    std::string message = "a ";
    message += type.find('&') != std::string::npos ? "reference" : "pointer";
    message += is_function ? " that is returned" : "";
    message += " has no address space: device, constant, threadgroup or thread";
    out.push_back({place.file(), place.line(), place.column(), message});
  }
  return out;
}

}  // namespace softmetal
