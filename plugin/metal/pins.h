// Memory that its owner keeps alive and unchanged: one buffer of Metal's for many calls.
#pragma once

#import <Metal/Metal.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace jax_gluon::metal {

// A range of a buffer.
struct BufferRange {
  id<MTLBuffer> buffer = nil;
  size_t offset = 0;
};

// The memory at `address` as a buffer, without a copy: in whole pages around it, which is all that
// Metal takes. Nil where Metal refuses.
BufferRange lend(id<MTLDevice> device, const void* address, size_t bytes);

class Pins {
 public:
  explicit Pins(id<MTLDevice> device) : device_(device) {}

  // Lends the memory, or copies it where Metal refuses to take it. Returns the pin's number; throws
  // Error where there is no memory.
  int64_t pin(const void* address, size_t bytes);
  void unpin(int64_t number);
  // Operands that were found in the pin's memory.
  int64_t uses(int64_t number);

  // Nil where no pin has all of this memory.
  BufferRange find(const void* address, size_t bytes);

 private:
  struct Pin {
    uintptr_t begin, end;
    BufferRange range;
    int64_t uses = 0;
  };
  id<MTLDevice> device_;
  std::mutex mutex_;
  std::map<int64_t, Pin> pins_;
  int64_t last_ = 0;
};

}  // namespace jax_gluon::metal
