// From Metal text to an image: preprocess, rewrite, compile, each in clang; results are kept on
// disk.
#include <fcntl.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>

#include "compiler/rewriter.h"
#include "softmetal/compiler.h"

extern char** environ;

namespace softmetal {
namespace {

namespace fs = std::filesystem;

std::string environment(const char* name, const std::string& otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// Where msl/ is: what the library was built from, unless told otherwise.
std::string home() { return environment("SOFTMETAL_HOME", SOFTMETAL_SOURCE_DIR); }

std::string clang() { return environment("SOFTMETAL_CLANG", "clang++-19"); }

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

bool write_file(const fs::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  return static_cast<bool>(out.flush());
}

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

struct Finished {
  int status = -1;  // of the process; -1: it did not start
  std::string errors;
};

// Runs a program with a file as its standard input; what it writes to standard error comes back.
Finished run_program(const std::vector<std::string>& words, const fs::path& input,
                     const fs::path& error_file) {
  std::vector<char*> arguments;
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  // A sanitizer preloaded into this process is not for the compiler.
  std::vector<char*> variables;
  for (char** each = environ; *each; ++each) {
    if (std::strncmp(*each, "LD_PRELOAD=", 11) != 0) variables.push_back(*each);
  }
  variables.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, input.c_str(), O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 2, error_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC,
                                   0600);
  Finished out;
  pid_t child = 0;
  const int failed =
      posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), variables.data());
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) {
    out.errors = "cannot run " + words[0] + ": " + std::strerror(failed) +
                 "; it is in Debian's package clang-19, or named by SOFTMETAL_CLANG\n";
    return out;
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  out.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
  out.errors = read_file(error_file);
  return out;
}

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

std::vector<std::string> preprocess_command(const CompileOptions& options) {
  std::vector<std::string> out = {
      clang(),  "-E",        "-x",          "c++",      "-std=c++20",
      "-undef", "-nostdinc", "-nostdinc++", "-isystem", home() + "/msl/preprocess"};
  const uint32_t version = options.language_version == 0 ? 0x30002 : options.language_version;
  out.push_back("-D__METAL_VERSION__=" +
                std::to_string((version >> 16) * 100 + (version & 0xffff) * 10));
  for (const char* each : {"-D__METAL__=1", "-D__METAL_MACOS__=1", "-D__HAVE_BFLOAT__=1"}) {
    out.emplace_back(each);
  }
  if (options.fast_math) out.emplace_back("-D__FAST_MATH__=1");
  for (const auto& [name, value] : options.macros) out.push_back("-D" + name + "=" + value);
  for (const std::string& folder : options.include_directories) out.push_back("-I" + folder);
  return out;
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
                                  "-shared",
                                  "-ffp-contract=on",
                                  "-fno-exceptions",
                                  "-fno-rtti",
                                  "-w",
                                  "-ferror-limit=20",
                                  "--rtlib=compiler-rt",
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
  if (options.target.empty()) {
    out.emplace_back("-march=native");
  } else {
    out.push_back("--target=" + options.target);
    out.emplace_back("-fuse-ld=lld-19");
  }
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
  return out;
}

std::string cache_folder() {
  const std::string own = environment("SOFTMETAL_CACHE_DIR", "");
  if (!own.empty()) return own;
  const std::string xdg = environment("XDG_CACHE_HOME", "");
  return (xdg.empty() ? environment("HOME", "/tmp") + "/.cache" : xdg) + "/softmetal";
}

// A folder of its own for each compilation, removed with it.
class WorkFolder {
 public:
  WorkFolder() {
    std::string path = (fs::temp_directory_path() / "softmetal-compile-XXXXXX").string();
    if (mkdtemp(path.data())) path_ = path;
  }
  WorkFolder(const WorkFolder&) = delete;
  WorkFolder& operator=(const WorkFolder&) = delete;
  ~WorkFolder() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

CompileResult failure(const std::string& diagnostics) {
  CompileResult out;
  out.diagnostics = diagnostics;
  return out;
}

}  // namespace

CompileResult compile(const std::string& source, const CompileOptions& options) {
  std::vector<std::string> preprocess = preprocess_command(options);
  std::vector<std::string> command = compile_command(options);

  const WorkFolder work;
  if (work.path().empty()) return failure("error: cannot make a temporary folder\n");
  const fs::path text = work.path() / "source.metal", expanded = work.path() / "source.ii";
  const fs::path rewritten = work.path() / "source.cc", errors = work.path() / "errors";
  const std::string name = options.source_name;
  if (!write_file(text, "#line 1 \"" + name + "\"\n" + source)) {
    return failure("error: cannot write " + text.string() + "\n");
  }
  // From standard input: the text has no path, which would be part of what names the image.
  preprocess.insert(preprocess.end(), {"-o", expanded.string(), "-"});
  Finished finished = run_program(preprocess, text, errors);
  if (finished.status != 0) return failure(finished.errors);
  const std::string preprocessed = read_file(expanded);

  // What was included is part of the text by now.
  Hash hash;
  hash.add(preprocessed);
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
    out.image_path = (folder / (hash.text() + ".metallib")).string();
    if (access(out.image_path.c_str(), R_OK) == 0) {
      out.ok = out.from_cache = true;
      return out;
    }
  }

  const Rewritten result = rewrite(preprocessed, name);
  if (!result.errors.empty()) {
    std::string all;
    for (const std::string& each : result.errors) all += each + "\n";
    return failure(all);
  }
  if (!write_file(rewritten, result.text)) {
    return failure("error: cannot write " + rewritten.string() + "\n");
  }
  // Another process may be making the same image: it appears whole or not at all.
  const std::string partial = out.image_path + "." + std::to_string(getpid()) + "-" +
                              work.path().filename().string().substr(18);
  command.insert(command.end(), {rewritten.string(), "-o", partial, "-lm"});
  finished = run_program(command, "/dev/null", errors);
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
