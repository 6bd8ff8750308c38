// Runs clang: what a compilation and a check have in common.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "softmetal/compiler.h"

namespace softmetal {

// An environment variable's value; `otherwise` where it is not set or empty.
std::string environment(const char* name, const std::string& otherwise);

// Where msl/ is: what the library was built from, unless told otherwise.
std::string home();
std::string clang();

std::string read_file(const std::filesystem::path& path);
bool write_file(const std::filesystem::path& path, const std::string& text);

struct Finished {
  int status = -1;  // of the process; -1: it did not start
  std::string errors;
};

// Runs a program with a file as its standard input, and its standard output in another one unless
// `output` is empty; what it writes to standard error comes back.
Finished run_program(const std::vector<std::string>& words, const std::filesystem::path& input,
                     const std::filesystem::path& output, const std::filesystem::path& error_file);

// A folder of its own for each compilation, removed with it.
class WorkFolder {
 public:
  WorkFolder();
  WorkFolder(const WorkFolder&) = delete;
  WorkFolder& operator=(const WorkFolder&) = delete;
  ~WorkFolder();
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

struct Preprocessed {
  std::string text;    // with line markers
  std::string errors;  // empty where it went well
};
Preprocessed preprocess(const std::string& source, const CompileOptions& options,
                        const WorkFolder& work);

}  // namespace softmetal
