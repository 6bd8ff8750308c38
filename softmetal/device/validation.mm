#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "softmetal/device/device.h"

namespace softmetal {
namespace {
std::atomic<bool> was_raised = false;
}

bool misuse_was_raised() { return was_raised; }

void misuse(const char* method, const std::string& what) {
  const std::string text = std::string(method) + ": failed assertion `" + what + "'";
  const char* mode = std::getenv("SOFTMETAL_VALIDATION");
  if (mode && std::strcmp(mode, "error") == 0) {
    was_raised = true;
    @throw [NSException exceptionWithName:NSInternalInconsistencyException
                                   reason:to_nsstring(text)
                                 userInfo:nil];
  }
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
}

}  // namespace softmetal
