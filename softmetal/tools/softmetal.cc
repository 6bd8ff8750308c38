// The command-line program: compiles Metal libraries ahead of time, shows what they declare, and
// builds host programs with this device's Metal.framework in place of Apple's.
#include "softmetal/softmetal.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "softmetal/c_api.h"

namespace {

constexpr char kUsage[] =
    "usage: softmetal check FILE.metal [options]\n"
    "       softmetal compile FILE.metal -o FILE.metallib [options]\n"
    "       softmetal reflect FILE.metal|FILE.metallib [options]\n"
    "       softmetal clang++ ARGUMENTS\n"
    "\n"
    "check     compiles strictly: address spaces as Apple's compiler wants them\n"
    "compile   makes a library that newLibraryWithURL: and newDefaultLibrary open\n"
    "reflect   prints kernels, their arguments and function constants as JSON\n"
    "clang++   compiles and links Objective-C++ against this device; -framework is accepted\n"
    "\n"
    "options: -D NAME[=VALUE]   -I FOLDER   --safe-math   --target aarch64-linux-gnu\n"
    "         --instrument none|counters|address|thread|undefined\n"
    "         --std metal3.1 and the like; default the newest\n";

constexpr const char* kInstrumentations[] = {"none", "counters", "address", "thread", "undefined"};
constexpr size_t kTextBytes = 1 << 20;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "softmetal: %s\n", what.c_str());
  std::exit(1);
}

struct Options {
  std::string file, output, target, macros, folders;
  int instrumentation = 0;
  uint32_t language_version = 0;
  bool safe_math = false;
};

// "metal3.1" as 0x30001.
uint32_t version_of(const std::string& std) {
  const auto digit = [&](size_t i) { return std[i] >= '0' && std[i] <= '9'; };
  if (std.size() != 8 || std.compare(0, 5, "metal") != 0 || !digit(5) || std[6] != '.' ||
      !digit(7)) {
    fail("--std " + std + "; allowed: metal2.3, metal3.1 and the like");
  }
  return static_cast<uint32_t>(std[5] - '0') << 16 | static_cast<uint32_t>(std[7] - '0');
}

Options parse(int argc, char** argv) {
  Options out;
  for (int i = 0; i < argc; ++i) {
    const std::string word = argv[i];
    // -DNAME and -D NAME alike.
    const auto value = [&](size_t prefix) -> std::string {
      if (word.size() > prefix) return word.substr(prefix);
      if (++i == argc) fail(word + " needs a value");
      return argv[i];
    };
    if (word.rfind("-D", 0) == 0) {
      out.macros += value(2) + "\n";
    } else if (word.rfind("-I", 0) == 0) {
      out.folders += value(2) + "\n";
    } else if (word == "-o") {
      out.output = value(2);
    } else if (word == "--target") {
      out.target = value(8);
    } else if (word == "--std") {
      out.language_version = version_of(value(5));
    } else if (word == "--safe-math") {
      out.safe_math = true;
    } else if (word == "--instrument") {
      const std::string name = value(12);
      const auto* found = std::begin(kInstrumentations);
      while (found != std::end(kInstrumentations) && name != *found) ++found;
      if (found == std::end(kInstrumentations)) {
        fail("--instrument " + name + "; allowed: none, counters, address, thread, undefined");
      }
      out.instrumentation = static_cast<int>(found - std::begin(kInstrumentations));
    } else if (word.rfind("-", 0) == 0) {
      fail("unknown option " + word + "\n" + kUsage);
    } else if (out.file.empty()) {
      out.file = word;
    } else {
      fail("one file, please: " + out.file + " or " + word);
    }
  }
  if (out.file.empty()) fail(std::string("no file\n") + kUsage);
  return out;
}

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail("cannot read " + path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// What `step`, softmetal_compile or softmetal_check, says of the file; diagnostics end the program.
std::string compile(const Options& options, decltype(&softmetal_compile) step = softmetal_compile) {
  const std::string source = read(options.file);
  const size_t slash = options.file.rfind('/');
  const std::string folders =
      options.folders + (slash == std::string::npos ? "." : options.file.substr(0, slash)) + "\n";
  softmetal_compile_request request = {};
  request.source = source.c_str();
  request.name = options.file.c_str();
  request.macros = options.macros.c_str();
  request.include_directories = folders.c_str();
  request.output = options.output.empty() ? nullptr : options.output.c_str();
  request.target = options.target.empty() ? nullptr : options.target.c_str();
  request.instrumentation = options.instrumentation;
  request.language_version = options.language_version;
  request.safe_math = options.safe_math;
  std::vector<char> text(kTextBytes);
  if (step(&request, text.data(), text.size()) != 0) {
    std::fprintf(stderr, "%s", text.data());
    std::exit(1);
  }
  return text.data();
}

int reflect(const Options& options) {
  const bool is_image = read(options.file).compare(0, 4, "\177ELF") == 0;
  const std::string path = is_image ? options.file : compile(options);
  std::vector<char> text(kTextBytes);
  void* image = softmetal_image_open(path.c_str(), nullptr, 0, text.data(), text.size());
  if (!image) fail(text.data());
  text.resize(softmetal_image_json(image, nullptr, 0));
  softmetal_image_json(image, text.data(), text.size());
  softmetal_image_close(image);
  std::printf("%s\n", text.data());
  return 0;
}

// Becomes clang++ with the flags of Objective-C as Apple's compiler makes it.
int run_clang(int argc, char** argv) {
  Dl_info library;
  if (!dladdr(reinterpret_cast<void*>(&softmetal_compile), &library))
    fail("libsoftmetal not found");
  const std::string path = library.dli_fname;
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash);
  const char* given_home = std::getenv("SOFTMETAL_HOME");
  const char* given_clang = std::getenv("SOFTMETAL_CLANG");
  const std::string home = given_home && *given_home ? given_home : SOFTMETAL_SOURCE_DIR;
  std::vector<std::string> words = {
      given_clang && *given_clang ? given_clang : "clang++-19",
      "-std=gnu++20",
      "-isystem",
      home + "/include",
      "-fobjc-runtime=macosx-12",
      "-fblocks",
      "-fobjc-exceptions",
      "-fexceptions",
  };
  bool links = true;
  for (int i = 0; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "-framework") {
      ++i;
      continue;
    }
    links = links && word != "-c" && word != "-E" && word != "-S" && word != "-fsyntax-only";
    words.push_back(word);
  }
  if (links) {
    for (const std::string& word : {std::string("-x"), std::string("none"), path,
                                    "-Wl,-rpath," + folder, std::string("-pthread")}) {
      words.push_back(word);
    }
  }
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  execvp(arguments[0], arguments.data());
  fail(words[0] + ": " + std::strerror(errno));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "clang++") return run_clang(argc - 2, argv + 2);
  if (command == "compile") {
    const Options options = parse(argc - 2, argv + 2);
    if (options.output.empty()) fail("compile needs -o FILE.metallib");
    compile(options);
    return 0;
  }
  if (command == "check") {
    compile(parse(argc - 2, argv + 2), softmetal_check);
    return 0;
  }
  if (command == "reflect") return reflect(parse(argc - 2, argv + 2));
  const bool asked = command == "--help" || command == "help";
  std::fputs(kUsage, asked ? stdout : stderr);
  return asked ? 0 : 2;
}
