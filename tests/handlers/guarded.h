// Buffers that end where a page begins that nobody may touch, or begin where one ends: of code that
// no sanitizer sees, too, an access beyond is a fault of the processor.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define GUARDED_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GUARDED_ASAN 1
#endif
#endif
#if defined(GUARDED_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace jax_gluon::handlers {

struct Guarded {
  char* data = nullptr;
  size_t bytes = 0;
  char* slack = nullptr;  // the side without the page, whose bytes are known
};

class GuardedMemory {
 public:
  static constexpr size_t kLargest = size_t{1} << 16, kCount = 64;

  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(memory_ - kPage, kWhole); }
  GuardedMemory() {
    void* memory = mmap(nullptr, kWhole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    memory_ = static_cast<char*>(memory) + kPage;
    for (size_t i = 0; i < kCount; ++i) {
      if (mprotect(slot(i), kLargest, PROT_READ | PROT_WRITE) != 0) std::abort();
    }
  }

  // Buffer `index` anew, of at most kLargest bytes.
  Guarded take(size_t index, size_t bytes, bool at_end) const {
    char* const data = slot(index) + (at_end ? kLargest - bytes : 0);
    const size_t free = kLargest - bytes;
    const size_t slack = free < kSlack ? free : kSlack;
    Guarded x{data, bytes, at_end ? data - slack : data + bytes};
    std::memset(x.slack, kCanary, slack);
    lock(x, true);
    return x;
  }
  // Whether the bytes beside it are as they were; the buffer is given back.
  bool release(const Guarded& x) const {
    lock(x, false);
    for (size_t i = 0; i < slack_of(x); ++i) {
      if (x.slack[i] != kCanary) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kPage = 4096, kSlack = 256;
  static constexpr size_t kWhole = kCount * (kLargest + kPage) + kPage;
  static constexpr char kCanary = 0x5a;

  char* slot(size_t i) const { return memory_ + i * (kLargest + kPage); }
  static size_t slack_of(const Guarded& x) {
    return kLargest - x.bytes < kSlack ? kLargest - x.bytes : kSlack;
  }
  static void lock([[maybe_unused]] const Guarded& x, [[maybe_unused]] bool locked) {
#if defined(GUARDED_ASAN)
    if (locked) {
      ASAN_POISON_MEMORY_REGION(x.slack, slack_of(x));
      ASAN_UNPOISON_MEMORY_REGION(x.data, x.bytes);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(x.slack, slack_of(x));
    }
#endif
  }

  char* memory_;
};

}  // namespace jax_gluon::handlers
