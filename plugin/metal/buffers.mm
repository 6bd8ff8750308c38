#include "metal/buffers.h"

#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace jax_gluon::metal {

Buffers::Range Buffers::lend(const void* address, size_t bytes) {
  const auto page = static_cast<uintptr_t>(getpagesize());
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + bytes + page - 1) / page * page;
  id<MTLBuffer> buffer = [context_.device() newBufferWithBytesNoCopy:reinterpret_cast<void*>(begin)
                                                              length:end - begin
                                                             options:MTLResourceStorageModeShared
                                                         deallocator:nil];
  return {buffer, reinterpret_cast<uintptr_t>(address) - begin};
}

Buffers::Range Buffers::read(const void* address, size_t bytes) {
  Range range = lend(address, bytes);
  if (range.buffer) return range;
  range = {[context_.device() newBufferWithBytes:address
                                          length:bytes
                                         options:MTLResourceStorageModeShared],
           0};
  if (!range.buffer) {
    throw Error("Metal has no memory for an operand of " + std::to_string(bytes) +
                " bytes; use smaller batches, or implementation=\"cpu\"");
  }
  return range;
}

Buffers::Range Buffers::write(void* address, size_t bytes) {
  Range range = lend(address, bytes);
  if (range.buffer) return range;
  range = {[context_.device() newBufferWithLength:bytes options:MTLResourceStorageModeShared], 0};
  if (!range.buffer) {
    throw Error("Metal has no memory for a result of " + std::to_string(bytes) +
                " bytes; use smaller batches, or implementation=\"cpu\"");
  }
  copies_.push_back({range.buffer, address, bytes});
  return range;
}

void Buffers::copy_back() {
  for (const Copy& copy : copies_) std::memcpy(copy.to, copy.from.contents, copy.bytes);
}

}  // namespace jax_gluon::metal
