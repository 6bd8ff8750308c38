// What the executor tells the sanitizers about fibers and memory. The hooks are weak: one library
// serves programs with and without a sanitizer's runtime.
#pragma once

#include <cstddef>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned flags);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
}

namespace softmetal::sanitizer {

inline bool thread() { return __tsan_switch_to_fiber != nullptr; }
inline bool address() { return __asan_poison_memory_region != nullptr; }

inline void poison(void* p, size_t n) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, n);
}
inline void unpoison(void* p, size_t n) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, n);
}
// What happened before a release of `sync` happens before what follows its acquire.
inline void acquire(void* sync) {
  if (__tsan_acquire) __tsan_acquire(sync);
}
inline void release(void* sync) {
  if (__tsan_release) __tsan_release(sync);
}

}  // namespace softmetal::sanitizer
