// From MSL text to an image on disk.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace softmetal {

enum class Instrumentation { kNone, kCounters, kAddress, kThread, kUndefined };

struct CompileOptions {
  std::string source_name = "program_source";  // what diagnostics call the text
  std::vector<std::pair<std::string, std::string>> macros;
  std::vector<std::string> include_directories;
  bool fast_math = true;
  uint32_t language_version = 0;  // 0x30001 is MSL 3.1; 0: the newest
  Instrumentation instrumentation = Instrumentation::kNone;
  std::string output;  // empty: the cache, keyed by a hash of everything above and the compiler
  std::string target;  // empty: this machine; "aarch64-linux-gnu" for ahead-of-time arm64
  bool syntax_only = false;  // no image is made
};

struct CompileResult {
  bool ok = false;
  std::string image_path;
  std::string diagnostics;  // errors and warnings in clang's form, at lines of the MSL text
  bool from_cache = false;
};

CompileResult compile(const std::string& source, const CompileOptions& options);

struct CheckResult {
  bool ok = false;
  std::string diagnostics;  // as those of a compilation
};

// Compiles the text and then checks what a compilation for this machine leaves out: that no
// pointer, reference, object or method is of one address space where Metal wants it of another one,
// and that every pointer and reference says of which it is.
CheckResult strict_check(const std::string& source, const CompileOptions& options);

}  // namespace softmetal
