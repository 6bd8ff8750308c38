#include "softmetal/device/settings.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <mutex>

#include "softmetal/softmetal.h"

namespace softmetal {
namespace {

// Dispatches that the log keeps; older ones are dropped.
constexpr size_t kLogLength = 1 << 16;

constexpr const char* kInstrumentations[] = {"none", "counters", "address", "thread", "undefined"};

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? value : nullptr;
}

std::atomic<uint64_t>& seed_setting() {
  static std::atomic<uint64_t> value = [] {
    const char* given = variable("SOFTMETAL_SEED");
    return given ? std::strtoull(given, nullptr, 10) : 0;
  }();
  return value;
}

int find_instrumentation(const char* name) {
  for (size_t i = 0; i < std::size(kInstrumentations); ++i) {
    if (std::strcmp(name, kInstrumentations[i]) == 0) return static_cast<int>(i);
  }
  return -1;
}

std::atomic<int>& instrumentation_setting() {
  static std::atomic<int> value = [] {
    const char* given = variable("SOFTMETAL_INSTRUMENT");
    const int found = given ? find_instrumentation(given) : 0;
    if (found < 0) {
      std::fprintf(stderr,
                   "softmetal: SOFTMETAL_INSTRUMENT is \"%s\"; allowed: none, counters, "
                   "address, thread, undefined\n",
                   given);
      std::abort();
    }
    return found;
  }();
  return value;
}

struct Log {
  std::mutex mutex;
  std::deque<std::string> entries;  // JSON objects
};
Log& log() {
  static Log& instance = *new Log;
  return instance;
}

}  // namespace

uint64_t seed() { return seed_setting(); }

Instrumentation instrumentation() {
  return static_cast<Instrumentation>(instrumentation_setting().load());
}

double time_limit() {
  static const double value = [] {
    const char* given = variable("SOFTMETAL_TIME_LIMIT");
    return given ? std::atof(given) : 0.0;
  }();
  return value;
}

namespace {
thread_local uint64_t command_buffer = 0;
}  // namespace

void begin_command_buffer() {
  static std::atomic<uint64_t> last = 0;
  command_buffer = ++last;
}

void log_work(const std::string& kernel, const Counters& counters) {
  std::string entry = "{\"kernel\": \"";
  for (const char c : kernel) {
    if (c == '"' || c == '\\') entry += '\\';
    entry += c;
  }
  entry += "\"";
  const auto add = [&entry](const char* name, uint64_t value) {
    entry += std::string(", \"") + name + "\": " + std::to_string(value);
  };
  add("command_buffer", command_buffer);
  add("device_bytes_read", counters.device_bytes_read);
  add("device_bytes_written", counters.device_bytes_written);
  add("device_bytes_read_unique", counters.device_bytes_read_unique);
  add("device_bytes_written_unique", counters.device_bytes_written_unique);
  add("threadgroup_bytes_read", counters.threadgroup_bytes_read);
  add("threadgroup_bytes_written", counters.threadgroup_bytes_written);
  add("threadgroup_memory_peak", counters.threadgroup_memory_peak);
  add("multiply_accumulates", counters.multiply_accumulates);
  add("exp2", counters.exp2);
  add("threadgroup_barriers", counters.threadgroup_barriers);
  add("simdgroup_barriers", counters.simdgroup_barriers);
  add("simdgroup_operations", counters.simdgroup_operations);
  add("threads", counters.threads);
  add("fiber_switches", counters.fiber_switches);
  entry += "}";
  Log& all = log();
  const std::lock_guard lock(all.mutex);
  if (all.entries.size() == kLogLength) all.entries.pop_front();
  all.entries.push_back(std::move(entry));
}

}  // namespace softmetal

#define SOFTMETAL_EXPORT extern "C" __attribute__((visibility("default")))

SOFTMETAL_EXPORT size_t softmetal_counters_json(char* text, size_t capacity) {
  std::string out = "[";
  {
    softmetal::Log& all = softmetal::log();
    const std::lock_guard lock(all.mutex);
    for (const std::string& entry : all.entries) {
      if (out.size() > 1) out += ",\n ";
      out += entry;
    }
  }
  out += "]";
  if (capacity != 0) {
    const size_t count = std::min(out.size(), capacity - 1);
    std::memcpy(text, out.data(), count);
    text[count] = '\0';
  }
  return out.size() + 1;
}

SOFTMETAL_EXPORT void softmetal_counters_reset() {
  softmetal::Log& all = softmetal::log();
  const std::lock_guard lock(all.mutex);
  all.entries.clear();
}

SOFTMETAL_EXPORT void softmetal_set_seed(uint64_t seed) { softmetal::seed_setting() = seed; }

SOFTMETAL_EXPORT int softmetal_set_instrumentation(const char* name) {
  const int found = softmetal::find_instrumentation(name);
  if (found < 0) return 0;
  softmetal::instrumentation_setting() = found;
  return 1;
}
