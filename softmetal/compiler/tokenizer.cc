#include "compiler/tokenizer.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace softmetal {
namespace {

bool starts_name(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool continues_name(char c) {
  return starts_name(c) || std::isdigit(static_cast<unsigned char>(c));
}

class Tokenizer {
 public:
  Tokenizer(std::string_view text, const std::string& name) : text_(text) {
    out_.files.push_back(name);
  }

  TokenizedText run() {
    while (at_ < text_.size()) {
      const size_t begin = at_;
      const TokenKind kind = next();
      Token token{kind, std::string(text_.substr(begin, at_ - begin)), line_, file_};
      const auto newlines =
          static_cast<unsigned>(std::count(token.text.begin(), token.text.end(), '\n'));
      line_ += newlines;
      if (kind == TokenKind::kDirective) read_marker(token.text);
      if (newlines != 0) {
        line_begins_ = true;
      } else if (kind != TokenKind::kSpace) {
        line_begins_ = false;
      }
      out_.tokens.push_back(std::move(token));
    }
    return std::move(out_);
  }

 private:
  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }

  // Moves past one token.
  TokenKind next() {
    const char c = peek();
    if (c == '#' && line_begins_) {
      while (at_ < text_.size() && peek() != '\n') at_ += peek() == '\\' && peek(1) == '\n' ? 2 : 1;
      return TokenKind::kDirective;
    }
    if (std::isspace(static_cast<unsigned char>(c))) {
      // A newline ends the token, so that a directive after it is seen as one.
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(peek()))) {
        if (text_[at_++] == '\n') break;
      }
      return TokenKind::kSpace;
    }
    if (c == '/' && (peek(1) == '/' || peek(1) == '*')) {
      const size_t end = peek(1) == '/' ? text_.find('\n', at_) : text_.find("*/", at_ + 2);
      at_ = end == std::string_view::npos ? text_.size() : peek(1) == '/' ? end : end + 2;
      return TokenKind::kSpace;
    }
    if (starts_name(c)) {
      const size_t begin = at_;
      while (continues_name(peek())) ++at_;
      if (peek() == '"' || peek() == '\'') {
        const std::string_view prefix = text_.substr(begin, at_ - begin);
        if (prefix == "R" || prefix == "LR" || prefix == "u8R" || prefix == "uR" ||
            prefix == "UR") {
          raw_string();
          return TokenKind::kString;
        }
        if (prefix == "L" || prefix == "u8" || prefix == "u" || prefix == "U") {
          quoted();
          return TokenKind::kString;
        }
      }
      return TokenKind::kIdentifier;
    }
    if (std::isdigit(static_cast<unsigned char>(c)) ||
        (c == '.' && std::isdigit(static_cast<unsigned char>(peek(1))))) {
      number();
      return TokenKind::kNumber;
    }
    if (c == '"' || c == '\'') {
      quoted();
      return TokenKind::kString;
    }
    static constexpr std::string_view kLong[] = {
        "...", "<=>", "<<=", "->*", "::", "->", "++", "--", "<<", "<=", ">=", "==",
        "!=",  "&&",  "||",  "+=",  "-=", "*=", "/=", "%=", "&=", "|=", "^=", ".*"};
    for (std::string_view each : kLong) {
      if (text_.substr(at_, each.size()) == each) {
        at_ += each.size();
        return TokenKind::kPunctuation;
      }
    }
    ++at_;  // > stays single: two of them may close two lists of template arguments
    return TokenKind::kPunctuation;
  }

  void number() {
    const bool hexadecimal = peek() == '0' && (peek(1) == 'x' || peek(1) == 'X');
    while (at_ < text_.size()) {
      const char c = peek();
      const bool exponent = hexadecimal ? c == 'p' || c == 'P' : c == 'e' || c == 'E';
      if (exponent && (peek(1) == '+' || peek(1) == '-')) {
        at_ += 2;
      } else if (continues_name(c) || c == '.' || (c == '\'' && continues_name(peek(1)))) {
        ++at_;
      } else {
        return;
      }
    }
  }

  void quoted() {
    const char quote = text_[at_++];
    while (at_ < text_.size() && peek() != quote && peek() != '\n') at_ += peek() == '\\' ? 2 : 1;
    at_ = std::min(at_ + 1, text_.size());
  }

  void raw_string() {
    const size_t open = text_.find('(', at_);
    if (open == std::string_view::npos) {
      at_ = text_.size();
      return;
    }
    const std::string close = ")" + std::string(text_.substr(at_ + 1, open - at_ - 1)) + "\"";
    const size_t end = text_.find(close, open);
    at_ = end == std::string_view::npos ? text_.size() : end + close.size();
  }

  // `# 12 "file" flags`: the next line is line 12 of the file.
  void read_marker(const std::string& text) {
    size_t at = 1;
    if (text.compare(0, 5, "#line") == 0) at = 5;
    char* end = nullptr;
    const unsigned long line = std::strtoul(text.c_str() + at, &end, 10);
    if (end == text.c_str() + at) return;
    line_ = static_cast<unsigned>(line) - 1;  // the newline that follows makes it this line
    const size_t open = text.find('"');
    const size_t close = open == std::string::npos ? open : text.find('"', open + 1);
    if (close == std::string::npos) return;
    const std::string name = text.substr(open + 1, close - open - 1);
    const auto known = std::find(out_.files.begin(), out_.files.end(), name);
    file_ = static_cast<unsigned>(known - out_.files.begin());
    if (known == out_.files.end()) out_.files.push_back(name);
  }

  std::string_view text_;
  size_t at_ = 0;
  unsigned line_ = 1, file_ = 0;
  bool line_begins_ = true;
  TokenizedText out_;
};

}  // namespace

TokenizedText tokenize(std::string_view text, const std::string& name) {
  return Tokenizer(text, name).run();
}

}  // namespace softmetal
