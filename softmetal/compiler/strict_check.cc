// The check of address spaces. clang compiles the text as C++ for OpenCL, with the declarations of
// strict/, and knows the rules of address spaces but for two: there a pointer without one is a
// generic pointer, which the syntax tree shows, and some expressions that are right are not
// accepted: these are repaired, and where that fails their diagnostics are taken out. Whatever is
// wrong regardless of address spaces has been found by the ordinary compiler before, so only
// diagnostics that speak of them count.
#include <algorithm>
#include <cctype>
#include <fstream>
#include <optional>
#include <regex>
#include <set>
#include <sstream>
#include <tuple>

#include "compiler/rewriter.h"
#include "compiler/toolchain.h"
#include "compiler/tree_errors.h"

namespace softmetal {
namespace {

namespace fs = std::filesystem;

// A part of one line of what is compiled, from 0.
struct Range {
  size_t line = 0, begin = 0, end = 0;
};
struct Message {
  std::string file, position;  // "12:3"
  std::string kind, text;
  std::vector<Range> operands;
  std::string excerpt;  // the lines below it
};
// An error and its notes.
using Diagnostic = std::vector<Message>;

// "{7:3-7:4}{7:9-7:12}:", those on one line.
std::vector<Range> operands_of(const std::string& text) {
  static const std::regex range("[{]([0-9]+):([0-9]+)-([0-9]+):([0-9]+)[}]");
  std::vector<Range> out;
  for (std::sregex_iterator i(text.begin(), text.end(), range), end; i != end; ++i) {
    const std::smatch& found = *i;
    if (found[1] != found[3]) continue;
    const auto number = [&](int k) { return std::stoul(found[k]) - 1; };
    out.push_back({number(1), number(2), number(4)});
  }
  return out;
}

std::vector<Diagnostic> parse_diagnostics(const std::string& output) {
  static const std::regex header(
      "(.*?):([0-9]+:[0-9]+):([{][-0-9:{}]+:)? (error|fatal error|warning|note): (.*)");
  std::vector<Diagnostic> out;
  std::istringstream lines(output);
  for (std::string line; std::getline(lines, line);) {
    std::smatch found;
    if (std::regex_match(line, found, header)) {
      if (found[4] != "note") out.emplace_back();
      if (out.empty()) continue;
      out.back().push_back({found[1], found[2], found[4], found[5], operands_of(found[3]), ""});
    } else if (!out.empty() && line.rfind("In file included from", 0) != 0 &&
               line.find(" generated.") == std::string::npos) {
      out.back().back().excerpt += line + "\n";
    }
  }
  return out;
}

bool contains(const std::string& text, const char* what) {
  return text.find(what) != std::string::npos;
}
bool any_note(const Diagnostic& diagnostic, const char* what) {
  return std::any_of(diagnostic.begin() + 1, diagnostic.end(),
                     [&](const Message& note) { return contains(note.text, what); });
}

bool mentions(const Diagnostic& diagnostic, const char* what) {
  return contains(diagnostic.front().text, what) || any_note(diagnostic, what);
}
bool speaks_of_address_spaces(const Diagnostic& diagnostic) {
  static constexpr const char* kWords[] = {"__global",  "__constant", "__local",
                                           "__private", "__generic",  "address space"};
  return std::any_of(std::begin(kWords), std::end(kWords),
                     [&](const char* word) { return mentions(diagnostic, word); });
}

bool copies_from_constant(const Diagnostic& diagnostic) {
  static const std::regex copy(
      ".*the implicit (copy|move) (constructor|assignment operator).* not viable: cannot bind "
      "reference in address space '__constant' to object in address space '__generic'.*");
  return std::any_of(diagnostic.begin() + 1, diagnostic.end(),
                     [](const Message& note) { return std::regex_match(note.text, copy); });
}

// Programs that Metal accepts and C++ for OpenCL does not, where no repair is known: what is in
// doubt is taken for right.
bool is_right_in_metal(const Diagnostic& diagnostic) {
  const std::string& text = diagnostic.front().text;
  // A class is copied from constant memory, or a method of the thread's objects is called for a
  // value that is no variable.
  if (copies_from_constant(diagnostic) ||
      any_note(diagnostic, "object is in default address space")) {
    return true;
  }
  // What is generic is memory of the thread: objects that a constructor makes, and what references
  // without an address space refer to.
  if (mentions(diagnostic, "__generic") && mentions(diagnostic, "__private") &&
      !mentions(diagnostic, "__global") && !mentions(diagnostic, "__local") &&
      !mentions(diagnostic, "__constant")) {
    return true;
  }
  // A value that is no variable is bound to a reference to memory of the thread.
  static const std::regex deduced(
      ".*would make '(const )?__private .*' equal '(?!__)(?!const __).*");
  if ((contains(text, "cannot bind to a temporary object because of address space mismatch") &&
       contains(text, "__private")) ||
      any_note(diagnostic,
               "cannot bind reference in default address space to object in address "
               "space '__private'") ||
      std::any_of(diagnostic.begin(), diagnostic.end(),
                  [](const Message& note) { return std::regex_match(note.text, deduced); })) {
    return true;
  }
  // A template of a variable's type, which does not include the variable's own address space.
  if (contains(text, "__private>") || contains(text, "__private,")) return true;
  // A choice between values in memory of two spaces.
  if (text.rfind("incompatible operand types", 0) == 0 && !contains(text, "*")) return true;
  // A template that was in error before.
  if (std::any_of(diagnostic.begin() + 1, diagnostic.end(), [](const Message& note) {
        return contains(note.text, "substitution failure") && note.text.back() == ']';
      })) {
    return true;
  }
  // An operator of numbers or pointers applied to a class that converts to a number; it is no
  // operator of the program's own whose operands are in the wrong space.
  return (text.rfind("invalid operands to binary expression", 0) == 0 ||
          text.rfind("invalid argument type", 0) == 0) &&
         !any_note(diagnostic, "in address space") && !any_note(diagnostic, "known conversion");
}

// --- Repairs ---

// An expression to be put between the parentheses of a function of the prelude.
struct Repair {
  Range range;
  const char* function;
};

// Argument k, from 1, of those that begin at `begin`; nothing where they don't end on that line.
std::optional<Range> argument(const std::string& line, size_t number, size_t begin, size_t k) {
  int depth = 0;
  for (size_t i = begin; i < line.size(); ++i) {
    const char c = line[i];
    if (c == '(' || c == '[' || c == '{') ++depth;
    const bool ends = depth == 0 && (c == ')' || c == ']' || c == '}');
    if ((depth == 0 && c == ',') || ends) {
      if (--k == 0) return Range{number, line.find_first_not_of(' ', begin), i};
      begin = i + 1;
    }
    if (ends) break;
    if (c == ')' || c == ']' || c == '}') --depth;
  }
  return std::nullopt;
}

// The argument of a call that is no variable, where a reference to thread memory is wanted.
std::optional<Range> unnamed_argument(const Diagnostic& diagnostic,
                                      const std::vector<std::string>& lines) {
  static const std::regex bound(
      ".*cannot bind reference in default address space to object in address space '__private' in "
      "([0-9]+).. argument");
  const Range& operand = diagnostic.front().operands.back();
  const std::string& line = lines[std::min(operand.line, lines.size() - 1)];
  for (const Message& note : diagnostic) {
    std::smatch found;
    if (!std::regex_match(note.text, found, bound)) continue;
    const size_t k = std::stoul(found[1]);
    if (diagnostic.front().text.rfind("no matching function", 0) != 0) {
      return argument(line, operand.line, operand.begin, k);
    }
    const size_t open = line.find('(', operand.end);  // past the arguments of a template
    if (open != std::string::npos) return argument(line, operand.line, open + 1, k);
  }
  return std::nullopt;
}

// Where C++ for OpenCL does not take an expression that Metal takes, what follows from it is not
// checked: so the text is changed until it does.
void find_repairs(const Diagnostic& diagnostic, const std::vector<std::string>& lines,
                  std::vector<Repair>* out) {
  const std::string& text = diagnostic.front().text;
  const std::vector<Range>& operands = diagnostic.front().operands;
  if (operands.empty()) return;
  const auto begins = [&](const char* with) { return text.rfind(with, 0) == 0; };
  static const std::regex unnamed(
      "(cannot initialize object parameter of type|binding reference of type) "
      "'(const )?__private .*' (with an expression of|to value of) "
      "type '(?!__)(?!const __).*'.*");
  // "no viable conversion" is what is said of a class between the braces of an array.
  if (copies_from_constant(diagnostic) || begins("no viable conversion from '")) {
    out->push_back({operands.back(), "softmetal::copied"});
  } else if (begins("incompatible operand types") && !contains(text, "*")) {
    for (const Range& operand : operands) out->push_back({operand, "softmetal::copied"});
  } else if (std::regex_match(text, unnamed) || begins("invalid argument type '") ||
             any_note(diagnostic, "object is in default address space")) {
    out->push_back({operands.front(), "softmetal::stored"});
  } else if (begins("invalid operands to binary expression ('") && operands.size() == 2 &&
             !any_note(diagnostic, "in address space")) {
    out->push_back({operands.back(), "softmetal::number"});
  } else if (const std::optional<Range> unnamed = unnamed_argument(diagnostic, lines)) {
    out->push_back({*unnamed, "softmetal::stored"});
  }
}

// Makes those that are not within one another or within an earlier one; false where there is none.
bool repair(std::vector<Repair> repairs, std::vector<std::string>* lines) {
  std::sort(repairs.begin(), repairs.end(), [](const Repair& a, const Repair& b) {
    return std::tie(a.range.line, a.range.begin) > std::tie(b.range.line, b.range.begin);
  });
  bool any = false;
  size_t line_before = 0, begin_before = 0;
  for (const Repair& each : repairs) {
    auto [line, begin, end] = each.range;
    if (line >= lines->size() || end > (*lines)[line].size() || begin >= end) continue;
    std::string& text = (*lines)[line];
    if (text[begin] == '{' && text[end - 1] == '}') ++begin, --end;
    if (line == line_before && end > begin_before && any) continue;
    const std::string expression = text.substr(begin, end - begin);
    if (expression.rfind("softmetal::", 0) == 0) continue;
    text.replace(begin, end - begin, std::string(each.function) + "(" + expression + ")");
    any = true;
    line_before = line;
    begin_before = begin;
  }
  return any;
}

// The names of OpenCL, and those of the prelude, as Metal's.
std::string in_metal(std::string text) {
  static const std::regex alias("'[^']*_softmetal_type' [(]aka ('[^']*')[)]");
  text = std::regex_replace(text, alias, "$1");
  static constexpr std::pair<const char*, const char*> kNames[] = {
      {"__global", "device"},  {"__constant", "constant"}, {"__local", "threadgroup"},
      {"__private", "thread"}, {"__generic ", ""},         {"softmetal_name_", ""},
      {"*thread'", "*'"},      {"*__generic'", "*'"},      {"const constant", "constant"}};
  for (const auto& [from, to] : kNames) {
    for (size_t at = 0; (at = text.find(from, at)) != std::string::npos;) {
      text.replace(at, std::string(from).size(), to);
      at += std::string(to).size();
    }
  }
  return text;
}

std::string shown(Diagnostic diagnostic, const std::string& prelude) {
  const auto foreign = [&](const Message& message) { return message.file.rfind(prelude, 0) == 0; };
  // What is wrong inside a function of the library is wrong where the program calls it.
  if (foreign(diagnostic.front())) {
    const auto use = std::find_if_not(diagnostic.begin(), diagnostic.end(), foreign);
    if (use == diagnostic.end()) return "";
    diagnostic.front().file = use->file;
    diagnostic.front().position = use->position;
    diagnostic.front().excerpt = use->excerpt;
  }
  std::string out;
  for (const Message& message : diagnostic) {
    if (foreign(message) || contains(message.text, "expanded from macro")) continue;
    out += message.file + ":" + message.position + ": " + message.kind + ": " +
           in_metal(message.text) + "\n" +
           (contains(message.excerpt, "softmetal::") ? "" : message.excerpt);
  }
  return out;
}

// Repairs bring to light what they hid.
constexpr int kRounds = 8;

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) out.push_back(std::move(line));
  return out;
}

std::vector<std::string> check_command() {
  return {clang(),
          "-x",
          "clcpp",
          "-cl-std=clc++2021",
          "-cl-no-stdinc",
          "-Xclang",
          "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64,-__opencl_c_pipes,-__opencl_c_device_enqueue,"
          "-__opencl_c_program_scope_global_variables,+cl_khr_fp16",
          "--target=x86_64-linux-gnu",
          "-fdeclspec",
          "-fsyntax-only",
          "-w",
          "-ferror-limit=0",
          "-fno-color-diagnostics",
          "-fno-spell-checking",
          "-fdiagnostics-print-source-range-info",
          "-Xclang",
          "-ast-dump",
          "-I" + home(),
          "-include",
          home() + "/strict/prelude.h"};
}

}  // namespace

CheckResult strict_check(const std::string& source, const CompileOptions& options) {
  CompileOptions ordinary = options;
  ordinary.syntax_only = true;
  const CompileResult compiled = compile(source, ordinary);
  if (!compiled.ok) return {false, compiled.diagnostics};

  const WorkFolder work;
  const Preprocessed preprocessed = preprocess(source, options, work);
  if (!preprocessed.errors.empty()) return {false, preprocessed.errors};
  const Rewritten rewritten =
      rewrite(preprocessed.text, options.source_name, Purpose::kAddressSpaces);
  const fs::path text = work.path() / "source.cl", tree = work.path() / "tree";
  std::vector<std::string> lines = lines_of(rewritten.text), command = check_command();
  command.push_back(text.string());
  std::vector<Diagnostic> diagnostics;
  for (int round = 0; round < kRounds; ++round) {
    std::string all;
    for (const std::string& line : lines) all += line + "\n";
    if (!write_file(text, all)) return {false, "error: cannot write " + text.string() + "\n"};
    const Finished finished = run_program(command, "/dev/null", tree, work.path() / "errors");
    if (finished.status < 0) return {false, finished.errors};
    diagnostics = parse_diagnostics(finished.errors);
    std::vector<Repair> repairs;
    for (const Diagnostic& diagnostic : diagnostics) find_repairs(diagnostic, lines, &repairs);
    if (!repair(std::move(repairs), &lines)) break;
  }

  CheckResult out;
  const std::string prelude = home() + "/";
  std::set<std::pair<std::string, std::string>> told;
  for (const Diagnostic& diagnostic : diagnostics) {
    if (!speaks_of_address_spaces(diagnostic) || is_right_in_metal(diagnostic)) continue;
    // Once, not for each instantiation.
    const Message& first = diagnostic.front();
    if (!told.insert({first.file, first.position}).second) continue;
    out.diagnostics += shown(diagnostic, prelude);
  }
  std::ifstream dump(tree);
  const auto line_of = [&](const std::string& file, unsigned line) {
    std::istringstream lines(file == options.source_name ? source : read_file(file));
    std::string found;
    while (line-- > 0 && std::getline(lines, found)) {
    }
    return found;
  };
  const bool has_lambdas = options.language_version == 0 || options.language_version >= 0x30002;
  for (const TreeError& each : find_tree_errors(dump, prelude, has_lambdas)) {
    // What is deduced is of the space of what it is deduced from.
    if (each.is_declared && contains(line_of(each.file, each.line), "auto")) continue;
    out.diagnostics += each.file + ":" + std::to_string(each.line) + ":" +
                       std::to_string(each.column) + ": error: " + each.message + "\n";
  }
  out.ok = out.diagnostics.empty();
  return out;
}

}  // namespace softmetal
