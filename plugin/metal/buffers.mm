#include "metal/buffers.h"

#include <cstring>
#include <string>

namespace jax_gluon::metal {
namespace {

Error no_memory(const char* what, size_t bytes) {
  return Error(std::string("Metal has no memory for ") + what + " of " + std::to_string(bytes) +
               " bytes; use smaller batches, or implementation=\"cpu\"");
}

}  // namespace

Buffers::Range Buffers::read(const void* address, size_t bytes) {
  const auto* first = static_cast<const char*>(address);
  for (const Written& written : written_) {
    const auto* begin = static_cast<const char*>(written.address);
    if (first < begin || first + bytes > begin + written.bytes) continue;
    return {written.range.buffer, written.range.offset + static_cast<size_t>(first - begin)};
  }
  if (const Range pinned = context_.pins().find(address, bytes); pinned.buffer) return pinned;
  const Range lent = lend(context_.device(), address, bytes);
  return lent.buffer ? lent : copy(address, bytes);
}

Buffers::Range Buffers::copy(const void* address, size_t bytes) {
  id<MTLBuffer> buffer = [context_.device() newBufferWithBytes:address
                                                        length:bytes
                                                       options:MTLResourceStorageModeShared];
  if (!buffer) throw no_memory("an operand", bytes);
  return {buffer, 0};
}

Buffers::Range Buffers::write(void* address, size_t bytes) {
  Range range = lend(context_.device(), address, bytes);
  const bool is_copied = !range.buffer;
  if (is_copied) {
    range = {[context_.device() newBufferWithLength:bytes options:MTLResourceStorageModeShared], 0};
    if (!range.buffer) throw no_memory("a result", bytes);
  }
  written_.push_back({range, address, bytes, is_copied});
  return range;
}

void Buffers::copy_back() {
  for (const Written& each : written_) {
    if (each.is_copied) std::memcpy(each.address, each.range.buffer.contents, each.bytes);
  }
}

}  // namespace jax_gluon::metal
