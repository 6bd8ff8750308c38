// Preprocessed Metal text as tokens. Nothing is lost: the texts of all tokens, one after another,
// are the text.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace softmetal {

enum class TokenKind : unsigned char {
  kSpace,      // blanks, newlines, comments
  kDirective,  // a line that begins with #: line markers and pragmas
  kIdentifier,
  kNumber,
  kString,  // with its prefix and quotes; characters too
  kPunctuation,
};

struct Token {
  TokenKind kind;
  std::string text;
  unsigned line = 0;  // of `file`, as the line markers say
  unsigned file = 0;  // index into TokenizedText::files

  bool is(std::string_view what) const { return text == what; }
  bool blank() const { return kind == TokenKind::kSpace || kind == TokenKind::kDirective; }
};

struct TokenizedText {
  std::vector<Token> tokens;
  std::vector<std::string> files;
};

// `name` is the file of lines before the first marker.
TokenizedText tokenize(std::string_view text, const std::string& name);

}  // namespace softmetal
