// Tells ThreadSanitizer about orderings made by code that it does not see. Null without a
// sanitizer.
#pragma once

extern "C" {
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
}

namespace softmetal::objc {

inline void tsan_acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
inline void tsan_release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

}  // namespace softmetal::objc
