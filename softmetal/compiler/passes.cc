#include "compiler/passes.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <set>
#include <string_view>

namespace softmetal {

void drop_attributes(Syntax& syntax) {
  for (Index i = 0; i < syntax.size(); ++i) {
    if (syntax.token(i).blank() || !syntax.opens_attribute(i)) continue;
    const Index end = syntax.partner(i);
    std::vector<Attribute> all;
    syntax.read_attributes(syntax.next(i) + 1, syntax.partner(syntax.next(i)), &all);
    const bool known = std::all_of(all.begin(), all.end(), [](const Attribute& each) {
      static const std::set<std::string> kept = {"maybe_unused", "nodiscard",        "fallthrough",
                                                 "likely",       "unlikely",         "noreturn",
                                                 "deprecated",   "no_unique_address"};
      return kept.count(each.name) != 0 || each.name.rfind("clang::", 0) == 0 ||
             each.name.rfind("gnu::", 0) == 0;
    });
    if (!known) syntax.erase(i, end + 1);
    i = end;
  }
}

void replace_literals(Syntax& syntax, bool keeps_pointers) {
  bool mentions_bfloat = false;
  for (Index i = 0; i < syntax.size(); ++i) {
    mentions_bfloat |= syntax.token(i).text.find("bfloat") != std::string::npos;
  }
  for (Index i = 0; i < syntax.size(); ++i) {
    Token& token = syntax.token(i);
    if (token.kind == TokenKind::kIdentifier && mentions_bfloat && token.is("static_cast")) {
      const Index close =
          keeps_pointers ? syntax.closing_angle(syntax.next(i), syntax.size()) : kNone;
      if (close == kNone || !one_of(syntax.token(syntax.previous(close)), {"*", "&"})) {
        token.text = "softmetal::cast";
      }
    }
    if (token.kind != TokenKind::kNumber) continue;
    std::string& x = token.text;
    const bool hexadecimal = x.size() > 1 && (x[1] == 'x' || x[1] == 'X');
    const bool floating = hexadecimal ? x.find_first_of("pP") != std::string::npos
                                      : x.find_first_of(".eE") != std::string::npos ||
                                            x.back() == 'h' || x.back() == 'H' ||
                                            (x.size() > 2 && x.substr(x.size() - 2) == "bf");
    if (!floating) continue;
    if (x.size() > 2 && x.substr(x.size() - 2) == "bf") {
      x = "(bfloat(" + x.substr(0, x.size() - 2) +
          (x.find_first_of(".eE") == std::string::npos ? ".0f))" : "f))");
    } else if (x.back() == 'h' || x.back() == 'H') {
      x = "(half(" + x.substr(0, x.size() - 1) +
          (x.find_first_of(".eE") == std::string::npos ? ".0f))" : "f))");
    } else if (std::isdigit(static_cast<unsigned char>(x.back())) || x.back() == '.') {
      x += "f";
    }
  }
}

void refuse_words(Syntax& syntax) {
  static const std::map<std::string_view, std::string_view> words = {
      {"double", "'double' is not supported in Metal"},
      {"dynamic_cast", "'dynamic_cast' is not supported in Metal"},
      {"virtual", "virtual functions are not supported in Metal"},
      {"throw", "exceptions are not supported in Metal"},
      {"try", "exceptions are not supported in Metal"},
      {"goto", "'goto' is not supported in Metal"},
      {"thread_local", "'thread_local' is not supported in Metal"},
      {"imageblock", "imageblocks are not supported here"},
  };
  for (Index i = 0; i < syntax.size(); ++i) {
    if (syntax.token(i).kind != TokenKind::kIdentifier) continue;
    const auto found = words.find(syntax.token(i).text);
    if (found != words.end()) syntax.error(i, std::string(found->second));
  }
}

void drop_pragmas(Syntax& syntax) {
  for (Index i = 0; i < syntax.size(); ++i) {
    Token& token = syntax.token(i);
    if (token.kind != TokenKind::kDirective) continue;
    const size_t unroll = token.text.find("unroll");
    if (token.text.find("pragma") == std::string::npos) continue;
    if (token.text.find("METAL") != std::string::npos) token.text.clear();
    if (unroll == std::string::npos || token.text.find("clang loop") != std::string::npos) continue;
    const size_t open = token.text.find('(', unroll);
    if (open == std::string::npos) continue;
    for (size_t k = open; k < token.text.size(); ++k) {
      if (std::isalpha(static_cast<unsigned char>(token.text[k]))) {
        token.text.clear();
        break;
      }
    }
  }
}

}  // namespace softmetal
