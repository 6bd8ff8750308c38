#include "compiler/syntax.h"

#include <algorithm>

namespace softmetal {

bool one_of(const Token& token, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), token.text) != names.end();
}
bool is_address_space(const Token& token) {
  return token.kind == TokenKind::kIdentifier &&
         one_of(token, {"device", "constant", "threadgroup", "thread"});
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

Syntax::Syntax(const std::string& text, const std::string& name, bool keeps_columns)
    : keeps_columns_(keeps_columns) {
  TokenizedText tokenized = tokenize(text, name);
  tokens_ = std::move(tokenized.tokens);
  files_ = std::move(tokenized.files);
  match_brackets();
}

Index Syntax::next(Index i) const {
  do ++i;
  while (i < tokens_.size() && tokens_[i].blank());
  return i;
}

Index Syntax::previous(Index i) const {
  while (i-- > 0) {
    if (!tokens_[i].blank()) return i;
  }
  return kNone;
}

bool Syntax::at(Index i, std::string_view text) const {
  return i < tokens_.size() && tokens_[i].text == text;
}

bool Syntax::identifier(Index i) const {
  return i < tokens_.size() && tokens_[i].kind == TokenKind::kIdentifier;
}

std::string Syntax::text(Index begin, Index end) const {
  std::string out;
  for (Index i = begin; i < end; ++i) {
    if (tokens_[i].kind == TokenKind::kDirective) continue;
    out += tokens_[i].blank() ? " " : tokens_[i].text;
  }
  const size_t first = out.find_first_not_of(' ');
  if (first == std::string::npos) return "";
  return out.substr(first, out.find_last_not_of(' ') - first + 1);
}

void Syntax::erase(Index begin, Index end) {
  for (Index i = begin; i < end; ++i) {
    Token& token = tokens_[i];
    if (token.kind == TokenKind::kDirective) continue;
    token.text = token.blank()
                     ? std::string(std::count(token.text.begin(), token.text.end(), '\n'), '\n')
                     : std::string(keeps_columns_ ? token.text.size() : 0, ' ');
    if (!token.blank()) token.kind = TokenKind::kSpace;
  }
}

void Syntax::error(Index i, const std::string& what) {
  const Token& token = tokens_[std::min(i, tokens_.size() - 1)];
  errors_.push_back(files_[token.file] + ":" + std::to_string(token.line) + ":1: error: " + what);
}

void Syntax::match_brackets() {
  partner_.assign(tokens_.size(), kNone);
  std::vector<Index> open;
  for (Index i = 0; i < tokens_.size(); ++i) {
    if (tokens_[i].kind != TokenKind::kPunctuation) continue;
    const char c = tokens_[i].text[0];
    if (tokens_[i].text.size() != 1) continue;
    if (c == '(' || c == '[' || c == '{') open.push_back(i);
    if (c != ')' && c != ']' && c != '}') continue;
    const char wanted = c == ')' ? '(' : c == ']' ? '[' : '{';
    if (open.empty() || tokens_[open.back()].text[0] != wanted) {
      error(i, std::string("unmatched '") + c + "'");
      return;
    }
    partner_[i] = open.back();
    partner_[open.back()] = i;
    open.pop_back();
  }
  if (!open.empty()) error(open.back(), "unmatched '" + tokens_[open.back()].text + "'");
}

Index Syntax::skip_parentheses(Index i) const {
  const Index open = next(i);
  return at(open, "(") ? partner_[open] : i;
}

Index Syntax::closing_angle(Index i, Index end) const {
  int depth = 0;
  for (Index j = i; j < end; ++j) {
    if (tokens_[j].blank()) continue;
    if (partner_[j] != kNone && partner_[j] > j) {
      j = partner_[j];
      continue;
    }
    if (at(j, "<")) ++depth;
    if (at(j, ">") && --depth == 0) return j;
    if (at(j, ";")) return kNone;
  }
  return kNone;
}

bool Syntax::opens_attribute(Index i) const {
  return at(i, "[") && at(next(i), "[") && partner_[i] != kNone &&
         previous(partner_[i]) == partner_[next(i)];
}

std::vector<Attribute> Syntax::attributes(Index begin, Index end) const {
  std::vector<Attribute> out;
  for (Index i = begin; i < end; ++i) {
    if (opens_attribute(i)) {
      read_attributes(next(i) + 1, partner_[next(i)], &out);
      i = partner_[i];
    } else if (partner_[i] != kNone && partner_[i] > i) {
      i = partner_[i];
    }
  }
  return out;
}

void Syntax::read_attributes(Index begin, Index end, std::vector<Attribute>* out) const {
  for (Index i = next(begin - 1); i < end; i = next(i)) {
    if (!identifier(i)) continue;
    Attribute attribute{tokens_[i].text, ""};
    while (at(next(i), "::")) {
      i = next(next(i));
      attribute.name += "::" + tokens_[i].text;
    }
    if (at(next(i), "(")) {
      i = next(i);
      attribute.argument = text(i + 1, partner_[i]);
      i = partner_[i];
    }
    out->push_back(attribute);
  }
}

const Attribute* Syntax::find(const std::vector<Attribute>& all, std::string_view name) {
  for (const Attribute& each : all) {
    if (each.name == name) return &each;
  }
  return nullptr;
}

}  // namespace softmetal
