// Preprocessed Metal text as tokens with their brackets matched, and what passes over it have in
// common.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "compiler/tokenizer.h"

namespace softmetal {

// The place of a token.
using Index = size_t;
constexpr Index kNone = static_cast<Index>(-1);

bool one_of(const Token& token, std::initializer_list<std::string_view> names);
bool is_address_space(const Token& token);
// As a string literal.
std::string quoted(const std::string& text);

struct Attribute {
  std::string name;
  std::string argument;  // the text between its parentheses
};

class Syntax {
 public:
  // Whether what is erased leaves blanks, so that the rest keeps its columns.
  Syntax(const std::string& text, const std::string& name, bool keeps_columns);
  Syntax(const Syntax&) = delete;
  Syntax& operator=(const Syntax&) = delete;

  Index size() const { return tokens_.size(); }
  Token& token(Index i) { return tokens_[i]; }
  // Of a bracket: the one that closes or opens it; else kNone.
  Index partner(Index i) const { return partner_[i]; }

  // The token after or before i that is no blank.
  Index next(Index i) const;
  Index previous(Index i) const;
  bool at(Index i, std::string_view text) const;
  bool identifier(Index i) const;
  // The ) of the parentheses that follow i; i where none do.
  Index skip_parentheses(Index i) const;
  // The > that closes the < at i, or kNone.
  Index closing_angle(Index i, Index end) const;
  // The text of [begin, end) on one line.
  std::string text(Index begin, Index end) const;
  // Empties [begin, end), but keeps its lines.
  void erase(Index begin, Index end);
  void error(Index i, const std::string& what);

  bool opens_attribute(Index i) const;
  // Attributes of [begin, end) outside of parentheses and braces.
  std::vector<Attribute> attributes(Index begin, Index end) const;
  // Those of [begin, end), between the brackets of an attribute.
  void read_attributes(Index begin, Index end, std::vector<Attribute>* out) const;
  static const Attribute* find(const std::vector<Attribute>& all, std::string_view name);

 protected:
  std::vector<Token> tokens_;
  std::vector<std::string> files_;
  std::vector<Index> partner_;
  std::vector<std::string> errors_;

 private:
  void match_brackets();

  const bool keeps_columns_;
};

}  // namespace softmetal
