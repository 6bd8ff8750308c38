// From Metal text to an image: preprocess, rewrite, compile, each in clang; results are kept on
// disk.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>

#include "compiler/count_products.h"
#include "compiler/rewriter.h"
#include "compiler/toolchain.h"
#include "softmetal/compiler.h"

namespace softmetal {
namespace {

namespace fs = std::filesystem;

// FNV-1a, twice, from different starts.
class Hash {
 public:
  void add(const std::string& x) {
    for (const char c : x) {
      a_ = (a_ ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
      b_ = (b_ ^ static_cast<unsigned char>(c) ^ 0x5a) * 0x100000001b3ull;
    }
    a_ = (a_ ^ 0xff) * 0x100000001b3ull;  // between two texts
    b_ = (b_ ^ 0xa5) * 0x100000001b3ull;
  }
  std::string text() const {
    char out[40];
    std::snprintf(out, sizeof out, "%016llx%016llx", static_cast<unsigned long long>(a_),
                  static_cast<unsigned long long>(b_));
    return out;
  }

 private:
  uint64_t a_ = 0xcbf29ce484222325ull, b_ = 0x84222325cbf29ce4ull;
};

const char* name_of(Instrumentation x) {
  switch (x) {
    case Instrumentation::kNone:
      return "none";
    case Instrumentation::kCounters:
      return "counters";
    case Instrumentation::kAddress:
      return "address";
    case Instrumentation::kThread:
      return "thread";
    case Instrumentation::kUndefined:
      return "undefined";
  }
  return "";
}

// All that decides about an image besides the text and the options.
const std::string& fingerprint() {
  static const std::string text = [] {
    Hash hash;
    std::vector<fs::path> files;
    std::error_code ignored;
    for (const auto& each : fs::recursive_directory_iterator(home() + "/msl", ignored)) {
      if (each.is_regular_file()) files.push_back(each.path());
    }
    files.emplace_back(home() + "/image.h");
    std::sort(files.begin(), files.end());
    for (const fs::path& file : files) {
      hash.add(file.filename().string());
      hash.add(read_file(file));
    }
    return hash.text();
  }();
  return text;
}

// What -march=native stands for.
std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("flags", 0) == 0 || line.rfind("Features", 0) == 0) return line;
  }
  return "";
}

// The compiler's identity: its file's size and date.
std::string compiler_identity() {
  std::string found = clang();
  if (found.find('/') == std::string::npos) {
    std::istringstream path(environment("PATH", "/usr/bin:/bin"));
    for (std::string folder; std::getline(path, folder, ':');) {
      if (access((folder + "/" + found).c_str(), X_OK) == 0) {
        found = folder + "/" + found;
        break;
      }
    }
  }
  struct stat about = {};
  if (stat(found.c_str(), &about) != 0) return found;
  return found + ":" + std::to_string(about.st_size) + ":" + std::to_string(about.st_mtime);
}

std::vector<std::string> compile_command(const CompileOptions& options) {
  std::vector<std::string> out = {clang(),
                                  "-x",
                                  "c++",
                                  "-std=c++20",
                                  "-fdeclspec",
                                  "-fsigned-char",
                                  "-O2",
                                  "-fPIC",
                                  "-fstack-clash-protection",
                                  "-shared",
                                  "-ffp-contract=on",
                                  "-fno-exceptions",
                                  "-fno-rtti",
                                  "-w",
                                  "-ferror-limit=20",
                                  "-fvisibility=hidden",
                                  "-Xclang",
                                  "-ffloat16-excess-precision=none",
                                  "-Xclang",
                                  "-fbfloat16-excess-precision=none"};
  out.push_back("-I" + home() + "/..");
  out.push_back("-I" + home() + "/msl");
  for (const char* header : {"metal_stdlib", "softmetal_kernel.h"}) {
    out.emplace_back("-include");
    out.push_back(home() + "/msl/" + header);
  }
  // clang's own has what x86-64 lacks of bfloat; for other processors it is seldom installed.
  out.push_back(options.target.empty() ? "--rtlib=compiler-rt" : "--rtlib=libgcc");
  if (options.target.empty()) {
    out.emplace_back("-march=native");
  } else {
    out.push_back("--target=" + options.target);
    out.emplace_back("-fuse-ld=lld-19");
  }
#if defined(__x86_64__)
  // Accesses of more than 16 bytes, which stand for several of the program's, are not instrumented.
  const bool watches = options.instrumentation == Instrumentation::kCounters ||
                       options.instrumentation == Instrumentation::kThread;
  if (watches && options.target.empty()) out.emplace_back("-mprefer-vector-width=128");
#endif
  switch (options.instrumentation) {
    case Instrumentation::kNone:
      out.emplace_back("-g0");
      break;
    case Instrumentation::kCounters:
      // Loads and stores call the executor; see executor/access_callbacks.cc.
      out.insert(out.end(),
                 {"-g0", "-DSOFTMETAL_COUNT=1", "-Xclang", "-fsanitize=thread", "-mllvm",
                  "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-atomics=0",
                  // Else a read is left out where a write of the same place follows.
                  "-mllvm", "-tsan-instrument-read-before-write=1"});
      break;
    case Instrumentation::kAddress:
      out.insert(out.end(), {"-g1", "-fsanitize=address", "-shared-libsan"});
      break;
    case Instrumentation::kThread:
      out.insert(out.end(), {"-g1", "-fsanitize=thread", "-shared-libsan"});
      break;
    case Instrumentation::kUndefined:
      out.insert(out.end(), {"-g1", "-fsanitize=undefined", "-shared-libsan"});
      break;
  }
  std::istringstream more(environment("SOFTMETAL_CLANG_FLAGS", ""));
  for (std::string flag; more >> flag;) out.push_back(flag);
  return out;
}

std::string cache_folder() {
  const std::string own = environment("SOFTMETAL_CACHE_DIR", "");
  if (!own.empty()) return own;
  const std::string xdg = environment("XDG_CACHE_HOME", "");
  return (xdg.empty() ? environment("HOME", "/tmp") + "/.cache" : xdg) + "/softmetal";
}

CompileResult failure(const std::string& diagnostics) {
  CompileResult out;
  out.diagnostics = diagnostics;
  return out;
}

// The text as C++ in a file; what went wrong comes back.
std::string write_rewritten(const std::string& preprocessed, const CompileOptions& options,
                            const fs::path& path) {
  const Rewritten result = rewrite(preprocessed, options.source_name);
  std::string errors;
  for (const std::string& each : result.errors) errors += each + "\n";
  if (!errors.empty() || write_file(path, result.text)) return errors;
  return "error: cannot write " + path.string() + "\n";
}

CompileResult check_syntax(const std::string& preprocessed, const CompileOptions& options,
                           const WorkFolder& work) {
  const fs::path rewritten = work.path() / "source.cc";
  const std::string problems = write_rewritten(preprocessed, options, rewritten);
  if (!problems.empty()) return failure(problems);
  std::vector<std::string> command = compile_command(options);
  command.insert(command.end(), {"-fsyntax-only", rewritten.string()});
  const Finished finished = run_program(command, "/dev/null", "", work.path() / "errors");
  CompileResult out;
  out.ok = finished.status == 0;
  out.diagnostics = finished.errors;
  return out;
}

// The C++ as LLVM text in which products are counted; what went wrong comes back.
std::string write_counted(std::vector<std::string> command, const fs::path& source,
                          const fs::path& path, const WorkFolder& work) {
  command.insert(command.end(), {"-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes",
                                 "-fno-discard-value-names", source.string(), "-o", path.string()});
  const Finished finished = run_program(command, "/dev/null", "", work.path() / "errors");
  if (finished.status != 0) return finished.errors;
  if (write_file(path, count_products(read_file(path)))) return "";
  return "error: cannot write " + path.string() + "\n";
}

// Whether nothing but headers of the language can be included: every "include" is followed by <,
// and there are no folders to find others in.
bool is_self_contained(const std::string& source, const CompileOptions& options) {
  if (!options.include_directories.empty()) return false;
  for (const char* word : {"import", "embed"}) {
    if (source.find(word) != std::string::npos) return false;
  }
  constexpr std::string_view kInclude = "include";
  for (size_t at = 0; (at = source.find(kInclude, at)) != std::string::npos;) {
    at = source.find_first_not_of(" \t", at + kInclude.size());
    if (at == std::string::npos || source[at] != '<') return false;
  }
  return true;
}

}  // namespace

CompileResult compile(const std::string& source, const CompileOptions& options) {
  std::vector<std::string> command = compile_command(options);
  const WorkFolder work;
  Preprocessed preprocessed;
  Hash hash;
  // Where it can be, an image is found by the text as it is: running the preprocessor takes longer
  // than all else.
  const bool is_whole = !options.syntax_only && is_self_contained(source, options);
  if (is_whole) {
    hash.add(options.source_name);
    hash.add(source);
    hash.add(std::to_string(options.language_version) + (options.fast_math ? " fast" : " safe"));
    for (const auto& [name, value] : options.macros) hash.add(name + "=" + value);
  } else {
    preprocessed = preprocess(source, options, work);
    if (!preprocessed.errors.empty()) return failure(preprocessed.errors);
    if (options.syntax_only) return check_syntax(preprocessed.text, options, work);
    hash.add(preprocessed.text);  // with what was included
  }
  for (const std::string& word : command) hash.add(word);
  hash.add(name_of(options.instrumentation));
  hash.add(fingerprint());
  hash.add(compiler_identity());
  if (options.target.empty()) hash.add(processor());
  CompileResult out;
  out.image_path = options.output;
  if (options.output.empty()) {
    const fs::path folder = cache_folder();
    std::error_code problem;
    fs::create_directories(folder, problem);
    out.image_path =
        (folder / (hash.text() + "." + name_of(options.instrumentation) + ".metallib")).string();
    if (access(out.image_path.c_str(), R_OK) == 0) {
      out.ok = out.from_cache = true;
      return out;
    }
  }

  if (is_whole) {
    preprocessed = preprocess(source, options, work);
    if (!preprocessed.errors.empty()) return failure(preprocessed.errors);
  }
  const fs::path rewritten = work.path() / "source.cc";
  const std::string problems = write_rewritten(preprocessed.text, options, rewritten);
  if (!problems.empty()) return failure(problems);
  // Another process may be making the same image: it appears whole or not at all.
  const std::string partial = out.image_path + "." + std::to_string(getpid()) + "-" +
                              work.path().filename().string().substr(18);
  fs::path input = rewritten;
  if (options.instrumentation == Instrumentation::kCounters) {
    input = work.path() / "source.ll";
    const std::string errors = write_counted(command, rewritten, input, work);
    if (!errors.empty()) return failure(errors);
    command.insert(command.end(), {"-x", "ir"});
  }
  command.insert(command.end(), {input.string(), "-o", partial, "-lm"});
  Finished finished = run_program(command, "/dev/null", "", work.path() / "errors");
  if (finished.status == 0 && std::rename(partial.c_str(), out.image_path.c_str()) != 0) {
    finished.status = 1;
    finished.errors += "error: cannot write " + out.image_path + "\n";
  }
  if (finished.status != 0) {
    unlink(partial.c_str());
    return failure(finished.errors);
  }
  out.ok = true;
  out.diagnostics = finished.errors;
  return out;
}

}  // namespace softmetal
