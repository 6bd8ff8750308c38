// What kernels compiled with counters call at every load and store: they are compiled with
// ThreadSanitizer's instrumentation, but without its runtime. In a process that has the runtime,
// its functions of these names come first, and nothing is counted.
#include "executor/worker.h"

#define SOFTMETAL_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
void count(const void* address, uint64_t size, bool is_write) {
  if (softmetal::Worker* worker = softmetal::Worker::current()) {
    worker->access(address, size, is_write);
  }
}
}  // namespace

#define SOFTMETAL_ACCESS(size)                                                          \
  SOFTMETAL_EXPORT void __tsan_read##size(void* p) { count(p, size, false); }           \
  SOFTMETAL_EXPORT void __tsan_write##size(void* p) { count(p, size, true); }           \
  SOFTMETAL_EXPORT void __tsan_unaligned_read##size(void* p) { count(p, size, false); } \
  SOFTMETAL_EXPORT void __tsan_unaligned_write##size(void* p) { count(p, size, true); } \
  SOFTMETAL_EXPORT void __tsan_read_write##size(void* p) {                              \
    count(p, size, false);                                                              \
    count(p, size, true);                                                               \
  }                                                                                     \
  SOFTMETAL_EXPORT void __tsan_unaligned_read_write##size(void* p) { __tsan_read_write##size(p); }

SOFTMETAL_ACCESS(1)
SOFTMETAL_ACCESS(2)
SOFTMETAL_ACCESS(4)
SOFTMETAL_ACCESS(8)
SOFTMETAL_ACCESS(16)

SOFTMETAL_EXPORT void __tsan_init() {}

SOFTMETAL_EXPORT void* __tsan_memcpy(void* to, const void* from, uint64_t size) {
  count(from, size, false);
  count(to, size, true);
  return __builtin_memcpy(to, from, size);
}
SOFTMETAL_EXPORT void* __tsan_memmove(void* to, const void* from, uint64_t size) {
  count(from, size, false);
  count(to, size, true);
  return __builtin_memmove(to, from, size);
}
SOFTMETAL_EXPORT void* __tsan_memset(void* to, int byte, uint64_t size) {
  count(to, size, true);
  return __builtin_memset(to, byte, size);
}
