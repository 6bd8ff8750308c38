// Which bytes of the bound buffers a dispatch read and wrote.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "softmetal/executor.h"

namespace softmetal {

class AccessMap {
 public:
  explicit AccessMap(const Dispatch& dispatch);

  // False where the address is in no buffer. Any number of threads may call it.
  bool mark(const void* address, uint64_t size, bool is_write);
  // Bytes that were read, and written, at least once.
  void count(Counters* into) const;

 private:
  struct Buffer {
    const char* begin;
    uint64_t length;
    std::unique_ptr<uint8_t[]> flags;  // of each byte: 1 read, 2 written
    std::once_flag allocated;
  };
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

}  // namespace softmetal
