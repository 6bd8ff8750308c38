#include "metal/self_test.h"

#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "cache_folder.h"
#include "metal/choice.h"
#include "metal/metal.h"

namespace jax_gluon {
namespace {

// Of a first run, most of it spent by Metal's compiler.
constexpr double kSeconds = 120;

double seconds_allowed() {
  const char* given = std::getenv("JAX_GLUON_METAL_SELF_TEST_SECONDS");
  const double seconds = given ? std::strtod(given, nullptr) : 0;
  return seconds > 0 ? seconds : kSeconds;
}

// All that an outcome holds for, in one line.
std::string subject() {
  utsname system = {};
  uname(&system);
  std::string text = metal_device_name() + ", shaders " + metal_shaders() + ", jax-gluon " +
                     JAX_GLUON_VERSION + ", " + system.sysname + " " + system.release + " " +
                     system.version;
  for (char& c : text) c = c == '\n' ? ' ' : c;
  return text;
}

std::string file() {
  const std::string folder = cache_folder();
  return folder.empty() ? "" : folder + "/metal-self-test.txt";
}

// Three lines: the subject, "passed" or "failed", why.
bool read(const std::string& path, const std::string& subject, MetalVerdict& verdict) {
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (!file) return false;
  char text[4096];
  const std::string found(text, std::fread(text, 1, sizeof text, file));
  std::fclose(file);
  const std::string passed = subject + "\npassed\n", failed = subject + "\nfailed\n";
  if (found.compare(0, passed.size(), passed) == 0) {
    verdict.passed = true;
    return true;
  }
  if (found.compare(0, failed.size(), failed) != 0) return false;
  verdict.why = found.substr(failed.size(), found.find('\n', failed.size()) - failed.size());
  return !verdict.why.empty();
}

// The file appears whole; without a folder that can be written nothing is kept.
bool write(const std::string& path, const std::string& subject, const MetalVerdict& verdict) {
  for (size_t at = path.find('/', 1); at != std::string::npos; at = path.find('/', at + 1)) {
    mkdir(path.substr(0, at).c_str(), 0777);
  }
  const std::string partial = path + "." + std::to_string(getpid());
  std::FILE* file = std::fopen(partial.c_str(), "w");
  if (!file) return false;
  const std::string text =
      subject + "\n" + (verdict.passed ? "passed" : "failed") + "\n" + verdict.why + "\n";
  const bool is_whole = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  const bool is_closed = std::fclose(file) == 0;
  if (is_whole && is_closed && std::rename(partial.c_str(), path.c_str()) == 0) return true;
  std::remove(partial.c_str());
  return false;
}

std::string in_one_line(std::string text) {
  for (char& c : text) c = c == '\n' || c == '\r' ? ' ' : c;
  return text;
}

// Keeps a verdict, and says where; nothing where it can't be kept.
MetalVerdict kept_at(const std::string& path, const std::string& about, MetalVerdict verdict) {
  if (!path.empty() && write(path, about, verdict)) verdict.file = path;
  return verdict;
}

// In a thread of its own, which is left behind where it does not end in time. Should it end after
// all, as on a machine that was too busy to compile, later processes find what came out.
MetalVerdict run(const std::string& path, const std::string& about) {
  std::string why;
  Device* metal = metal_device(&why);
  if (!metal) return {false, why, false, ""};
  struct Shared {
    std::mutex mutex;
    std::condition_variable ended;
    bool has_ended = false, is_late = false;
    MetalVerdict verdict;
  };
  const auto shared = std::make_shared<Shared>();
  std::thread([shared, metal, path, about] {
    Status status;
    try {
      status = compare_devices(*metal, cpu_device());
    } catch (const std::exception& error) {
      status = error.what();
    }
    const MetalVerdict found = {!status, status ? in_one_line(*status) : "", false, ""};
    const std::lock_guard<std::mutex> lock(shared->mutex);
    shared->verdict = found;
    shared->has_ended = true;
    if (shared->is_late) kept_at(path, about, found);
    shared->ended.notify_all();
  }).detach();
  const double seconds = seconds_allowed();
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::unique_lock<std::mutex> lock(shared->mutex);
  while (!shared->has_ended && std::chrono::steady_clock::now() < end) {
    // By this clock, in steps: waiting by the steady one asks for a younger glibc than the wheels
    // do.
    shared->ended.wait_until(lock,
                             std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  }
  if (shared->has_ended) return kept_at(path, about, shared->verdict);
  shared->is_late = true;
  char text[64];
  std::snprintf(text, sizeof text, "it did not end within %g seconds", seconds);
  return kept_at(path, about, {false, text, false, ""});
}

}  // namespace

bool tests_metal() {
  const char* given = std::getenv("JAX_GLUON_METAL_SELF_TEST");
  if (given && std::strcmp(given, "0") == 0) return false;
#if defined(__APPLE__)
  return true;
#else
  return metal_by_default();
#endif
}

MetalVerdict metal_verdict(bool again) {
  static std::mutex& mutex = *new std::mutex;
  static std::unique_ptr<MetalVerdict>& kept = *new std::unique_ptr<MetalVerdict>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (kept && !again) return *kept;
  const std::string about = subject();
  const std::string path = file();
  MetalVerdict verdict;
  if (!again && !path.empty() && read(path, about, verdict)) {
    verdict.remembered = true;
    verdict.file = path;
  } else {
    verdict = run(path, about);
  }
  kept = std::make_unique<MetalVerdict>(verdict);
  return verdict;
}

Status refusal_of_metal() {
  if (!tests_metal()) return {};
  const MetalVerdict verdict = metal_verdict(false);
  if (verdict.passed) return {};
  return "\"" + metal_device_name() + "\" did not pass jax_gluon's self-test: " + verdict.why;
}

}  // namespace jax_gluon
