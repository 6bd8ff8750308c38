// Memory of XLA's as buffers of Metal.
#pragma once

#import <Metal/Metal.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "metal/context.h"

namespace jax_gluon::metal {

// The buffers of one call. Memory is lent without a copy; where Metal refuses, it is copied, and
// results are copied back.
class Buffers {
 public:
  explicit Buffers(Context& context) : context_(context) {}

  using Range = BufferRange;
  // What was written before is read from the buffer that it was written to: Metal orders kernels by
  // the buffers that they share.
  Range read(const void* address, size_t bytes);
  Range write(void* address, size_t bytes);
  Range copy(const void* address, size_t bytes);

  // Results that were copied, to where they belong. After the last command buffer has run.
  void copy_back();

 private:
  struct Written {
    Range range;
    void* address;
    size_t bytes;
    bool is_copied;
  };

  Context& context_;
  std::vector<Written> written_;
};

}  // namespace jax_gluon::metal
