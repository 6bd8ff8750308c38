#include "compiler/toolchain.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

extern char** environ;

namespace softmetal {

namespace fs = std::filesystem;

std::string environment(const char* name, const std::string& otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

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

Finished run_program(const std::vector<std::string>& words, const fs::path& input,
                     const fs::path& output, const fs::path& error_file) {
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
  if (!output.empty()) {
    posix_spawn_file_actions_addopen(&actions, 1, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC,
                                     0600);
  }
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

WorkFolder::WorkFolder() {
  std::string path = (fs::temp_directory_path() / "softmetal-compile-XXXXXX").string();
  if (mkdtemp(path.data())) path_ = path;
}

WorkFolder::~WorkFolder() {
  std::error_code ignored;
  if (!path_.empty()) fs::remove_all(path_, ignored);
}

namespace {

std::vector<std::string> preprocess_command(const CompileOptions& options) {
  std::vector<std::string> out = {
      clang(),  "-E",        "-x",          "c++",      "-std=c++20",
      "-undef", "-nostdinc", "-nostdinc++", "-isystem", home() + "/msl/preprocess"};
  const uint32_t version = options.language_version == 0 ? 0x30002 : options.language_version;
  out.push_back("-D__METAL_VERSION__=" +
                std::to_string((version >> 16) * 100 + (version & 0xffff) * 10));
  for (const char* each : {"-D__METAL__=1", "-D__METAL_MACOS__=1"}) out.emplace_back(each);
  if (version >= 0x30001) out.emplace_back("-D__HAVE_BFLOAT__=1");
  if (options.fast_math) out.emplace_back("-D__FAST_MATH__=1");
  for (const auto& [name, value] : options.macros) out.push_back("-D" + name + "=" + value);
  for (const std::string& folder : options.include_directories) out.push_back("-I" + folder);
  return out;
}

}  // namespace

Preprocessed preprocess(const std::string& source, const CompileOptions& options,
                        const WorkFolder& work) {
  if (work.path().empty()) return {"", "error: cannot make a temporary folder\n"};
  const fs::path text = work.path() / "source.metal", expanded = work.path() / "source.ii";
  if (!write_file(text, "#line 1 \"" + options.source_name + "\"\n" + source)) {
    return {"", "error: cannot write " + text.string() + "\n"};
  }
  // From standard input: the text has no path, which would be part of what names the image.
  std::vector<std::string> command = preprocess_command(options);
  command.insert(command.end(), {"-o", expanded.string(), "-"});
  const Finished finished = run_program(command, text, "", work.path() / "errors");
  if (finished.status != 0) return {"", finished.errors};
  return {read_file(expanded), ""};
}

}  // namespace softmetal
