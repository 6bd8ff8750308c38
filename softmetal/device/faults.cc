#include "softmetal/device/faults.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <string>

#include "softmetal/softmetal.h"

namespace softmetal {
namespace {

constexpr const char* kNames[] = {
    "nil_device",       "old_family",           "old_language",
    "compile_failure",  "pipeline_failure",     "out_of_memory",
    "no_copy_refused",  "command_buffer_error", "command_buffer_out_of_memory",
    "watchdog",         "slow_completion",      "hang",
    "lost_threadgroup",
};
static_assert(std::size(kNames) == static_cast<size_t>(Fault::kCount));

struct Faults {
  std::mutex mutex;
  int left[static_cast<size_t>(Fault::kCount)] = {};  // -1: always

  // "name[:count][,name...]"
  Faults() {
    const char* given = std::getenv("SOFTMETAL_FAULT");
    std::string text = given ? given : "";
    while (!text.empty()) {
      const size_t comma = text.find(',');
      std::string name = text.substr(0, comma);
      text = comma == std::string::npos ? "" : text.substr(comma + 1);
      int count = -1;
      if (const size_t colon = name.find(':'); colon != std::string::npos) {
        count = std::atoi(name.c_str() + colon + 1);
        name.resize(colon);
      }
      if (!set(name.c_str(), count)) {
        std::fprintf(stderr, "softmetal: SOFTMETAL_FAULT names an unknown fault: %s\n",
                     name.c_str());
        std::abort();
      }
    }
  }

  bool set(const char* name, int count) {
    for (size_t i = 0; i < std::size(kNames); ++i) {
      if (std::strcmp(name, kNames[i]) != 0) continue;
      left[i] = count;
      return true;
    }
    return false;
  }
};

Faults& faults() {
  static Faults& instance = *new Faults;
  return instance;
}

}  // namespace

bool fault(Fault which) {
  Faults& all = faults();
  const std::lock_guard lock(all.mutex);
  int& left = all.left[static_cast<size_t>(which)];
  if (left > 0)
    --left;
  else if (left == 0)
    return false;
  return true;
}

}  // namespace softmetal

#define SOFTMETAL_EXPORT extern "C" __attribute__((visibility("default")))

SOFTMETAL_EXPORT int softmetal_inject_fault(const char* name, int count) {
  softmetal::Faults& all = softmetal::faults();
  const std::lock_guard lock(all.mutex);
  return all.set(name, count) ? 1 : 0;
}

SOFTMETAL_EXPORT void softmetal_clear_faults() {
  softmetal::Faults& all = softmetal::faults();
  const std::lock_guard lock(all.mutex);
  for (int& left : all.left) left = 0;
}
