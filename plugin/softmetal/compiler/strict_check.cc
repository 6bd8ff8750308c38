// The check of address spaces. clang compiles the text as C++ for OpenCL, with the declarations of
// strict/, and knows the rules of address spaces but for two: there a pointer without one is a
// generic pointer, which the syntax tree shows, and some programs that are right are not accepted,
// whose diagnostics are taken out again. Whatever is wrong regardless of address spaces has been
// found by the ordinary compiler before, so only diagnostics that speak of them count.
#include <algorithm>
#include <cctype>
#include <fstream>
#include <regex>
#include <set>
#include <sstream>

#include "compiler/rewriter.h"
#include "compiler/toolchain.h"
#include "compiler/tree_errors.h"

namespace softmetal {
namespace {

namespace fs = std::filesystem;

struct Message {
  std::string file, position;  // "12:3"
  std::string kind, text;
  std::string excerpt;  // the lines below it
};
// An error and its notes.
using Diagnostic = std::vector<Message>;

std::vector<Diagnostic> parse_diagnostics(const std::string& output) {
  static const std::regex header("(.*?):([0-9]+:[0-9]+): (error|fatal error|warning|note): (.*)");
  std::vector<Diagnostic> out;
  std::istringstream lines(output);
  for (std::string line; std::getline(lines, line);) {
    std::smatch found;
    if (std::regex_match(line, found, header)) {
      if (found[3] != "note") out.emplace_back();
      if (!out.empty()) out.back().push_back({found[1], found[2], found[3], found[4], ""});
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

// Programs that Metal accepts and C++ for OpenCL does not.
bool is_right_in_metal(const Diagnostic& diagnostic) {
  const std::string& text = diagnostic.front().text;
  // A class is copied from constant memory.
  for (const char* copy : {"copy constructor", "move constructor", "copy assignment operator",
                           "move assignment operator"}) {
    if (any_note(diagnostic, (std::string("(the implicit ") + copy +
                              ") not viable: cannot bind reference in address space '__constant' "
                              "to object in address space '__generic'")
                                 .c_str())) {
      return true;
    }
  }
  // A method of the thread's objects is called for a value that is no variable.
  static const std::regex unnamed(
      "cannot initialize object parameter of type '(const )?__private .*' with an expression of "
      "type '(?!__)(?!const __).*'");
  if (any_note(diagnostic, "object is in default address space") ||
      std::regex_match(text, unnamed)) {
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
  if (contains(text, "cannot bind to a temporary object because of address space mismatch") &&
      contains(text, "__private")) {
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

// The names of OpenCL, and those of the prelude, as Metal's.
std::string in_metal(std::string text) {
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
           in_metal(message.text) + "\n" + message.excerpt;
  }
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
  if (!write_file(text, rewritten.text)) {
    return {false, "error: cannot write " + text.string() + "\n"};
  }
  std::vector<std::string> command = check_command();
  command.push_back(text.string());
  const Finished finished = run_program(command, "/dev/null", tree, work.path() / "errors");
  if (finished.status < 0) return {false, finished.errors};

  CheckResult out;
  const std::string prelude = home() + "/";
  for (const Diagnostic& diagnostic : parse_diagnostics(finished.errors)) {
    if (!speaks_of_address_spaces(diagnostic) || is_right_in_metal(diagnostic)) continue;
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
