// Memory of XLA's as buffers of Metal.
#pragma once

#import <Metal/Metal.h>

#include <cstddef>
#include <vector>

#include "metal/context.h"

namespace jax_gluon::metal {

// The buffers of one call. Memory is lent without a copy, in whole pages around it, which is all
// that Metal takes; where Metal refuses, it is copied, and results are copied back.
class Buffers {
 public:
  explicit Buffers(Context& context) : context_(context) {}

  struct Range {
    id<MTLBuffer> buffer = nil;
    size_t offset = 0;
  };
  Range read(const void* address, size_t bytes);
  Range write(void* address, size_t bytes);

  // Results that were copied, to where they belong. After the last command buffer has run.
  void copy_back();

 private:
  struct Copy {
    id<MTLBuffer> from;
    void* to;
    size_t bytes;
  };
  Range lend(const void* address, size_t bytes);

  Context& context_;
  std::vector<Copy> copies_;
};

}  // namespace jax_gluon::metal
