// Images: a private copy of the file for each opening, so that every pipeline has constants of its
// own.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>

#include "softmetal/executor.h"

namespace softmetal {
namespace {

class LoadedImage : public Image {
 public:
  ~LoadedImage() override {
    if (handle) dlclose(handle);
  }
  const std::vector<const Kernel*>& kernels() const override { return kernels_; }
  const std::vector<FunctionConstant>& function_constants() const override { return constants_; }

  std::string pipeline(const std::string& kernel) const override { return kernel + suffix; }

  std::string suffix;  // of the names of its pipelines
  void* handle = nullptr;
  const std::vector<FunctionConstantValue>* values = nullptr;
  std::vector<const Kernel*> kernels_;
  std::vector<FunctionConstant> constants_;
};

// Static initialisers of the image that is being opened register themselves here.
std::mutex opening_mutex;
LoadedImage* opening = nullptr;

// The copies lie on disk until the process ends: reports of sanitizers and debuggers read them.
class Folder {
 public:
  Folder() {
    const char* base = getenv("TMPDIR");
    path_ = std::string(base && *base ? base : "/tmp") + "/softmetal-XXXXXX";
    if (!mkdtemp(path_.data())) path_.clear();
    owner_ = getpid();
  }
  ~Folder() {
    if (path_.empty() || owner_ != getpid()) return;  // a forked child leaves them to its parent
    for (int i = 0; i < count_; ++i) unlink(name(i).c_str());
    rmdir(path_.c_str());
  }
  std::string next() { return path_.empty() ? "" : name(count_++); }

 private:
  std::string name(int i) const { return path_ + "/image-" + std::to_string(i) + ".so"; }
  std::string path_;
  pid_t owner_ = 0;
  std::atomic<int> count_{0};
};

bool copy_file(const std::string& from, const std::string& to) {
  FILE* in = fopen(from.c_str(), "rb");
  FILE* out = in ? fopen(to.c_str(), "wb") : nullptr;
  char block[1 << 16];
  bool ok = out != nullptr;
  for (size_t n; ok && (n = fread(block, 1, sizeof block, in)) > 0;) {
    ok = fwrite(block, 1, n, out) == n;
  }
  ok = ok && !ferror(in);
  if (in) fclose(in);
  if (out && fclose(out) != 0) ok = false;
  return ok;
}

// Images call functions of this library. Where it was loaded for one other library alone, they
// would not find them.
void show_this_library() {
  static const bool done = [] {
    Dl_info self;
    if (dladdr(reinterpret_cast<void*>(&softmetal_thread), &self) && self.dli_fname) {
      dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
    }
    return true;
  }();
  static_cast<void>(done);
}

}  // namespace

const Kernel* Image::find(const std::string& name) const {
  for (const Kernel* kernel : kernels()) {
    if (name == kernel->name) return kernel;
  }
  return nullptr;
}

std::shared_ptr<Image> Image::open(const std::string& path,
                                   const std::vector<FunctionConstantValue>& constants,
                                   std::string* error) {
  static Folder folder;
  const std::string own = folder.next();
  if (own.empty() || !copy_file(path, own)) {
    *error = "cannot copy " + path + " to " + (own.empty() ? "a temporary folder" : own);
    return nullptr;
  }
  auto image = std::make_shared<LoadedImage>();
  for (const FunctionConstantValue& each : constants) {
    image->suffix += " " + (each.by_name ? each.name : std::to_string(each.index)) + "=";
    char hex[3];
    for (const unsigned char byte : each.bytes) {
      snprintf(hex, sizeof hex, "%02x", byte);
      image->suffix += hex;
    }
  }
  image->suffix += " " + path.substr(path.rfind('/') + 1);
  image->values = &constants;
  {
    const std::lock_guard<std::mutex> lock(opening_mutex);
    show_this_library();
    opening = image.get();
    image->handle = dlopen(own.c_str(), RTLD_NOW | RTLD_LOCAL);
    opening = nullptr;
    if (!image->handle) *error = dlerror();
  }
  image->values = nullptr;
  if (!image->handle) return nullptr;
  return image;
}

void record_pipeline(const std::string& pipeline) {
  static const char* path = getenv("SOFTMETAL_PIPELINES");
  if (!path || !*path) return;
  static std::mutex& mutex = *new std::mutex;
  static std::set<std::string>& seen = *new std::set<std::string>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!seen.insert(pipeline).second) return;
  // One write for each line, since other processes add theirs.
  const int file = ::open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  const std::string line = pipeline + "\n";
  if (file < 0 || write(file, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    fprintf(stderr, "softmetal: cannot write %s, of SOFTMETAL_PIPELINES\n", path);
  }
  if (file >= 0) close(file);
}

}  // namespace softmetal

#define SOFTMETAL_EXPORT extern "C" __attribute__((visibility("default")))

SOFTMETAL_EXPORT void softmetal_register_kernel(const softmetal::Kernel* kernel) {
  if (softmetal::opening) softmetal::opening->kernels_.push_back(kernel);
}

SOFTMETAL_EXPORT bool softmetal_function_constant(uint32_t index, const char* name,
                                                  const char* type, uint32_t size, void* value) {
  softmetal::LoadedImage* image = softmetal::opening;
  if (!image) return false;
  bool is_defined = false;
  for (const softmetal::FunctionConstantValue& each : *image->values) {
    if (each.by_name ? each.name != name : each.index != index) continue;
    if (each.bytes.size() < size) continue;  // of another type
    std::memcpy(value, each.bytes.data(), size);
    is_defined = true;
  }
  image->constants_.push_back({index, name, type, size, is_defined});
  return is_defined;
}
