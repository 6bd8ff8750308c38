#include "executor/access_map.h"

#include <algorithm>

namespace softmetal {

AccessMap::AccessMap(const Dispatch& dispatch) {
  for (const BufferBinding& binding : dispatch.buffers) {
    if (!binding.address || binding.length == 0) continue;
    auto buffer = std::make_unique<Buffer>();
    buffer->begin = static_cast<const char*>(binding.address);
    buffer->length = binding.length;
    // Memory that is bound twice counts once.
    const bool known = std::any_of(buffers_.begin(), buffers_.end(), [&](const auto& each) {
      return each->begin == buffer->begin && each->length >= buffer->length;
    });
    if (!known) buffers_.push_back(std::move(buffer));
  }
}

bool AccessMap::mark(const void* address, uint64_t size, bool is_write) {
  const auto* byte = static_cast<const char*>(address);
  for (const auto& buffer : buffers_) {
    if (byte < buffer->begin || byte >= buffer->begin + buffer->length) continue;
    std::call_once(buffer->allocated,
                   [&] { buffer->flags = std::make_unique<uint8_t[]>(buffer->length); });
    const auto first = static_cast<uint64_t>(byte - buffer->begin);
    const uint64_t last = std::min(first + size, buffer->length);
    for (uint64_t i = first; i < last; ++i) {
      __atomic_fetch_or(&buffer->flags[i], is_write ? 2 : 1, __ATOMIC_RELAXED);
    }
    return true;
  }
  return false;
}

void AccessMap::count(Counters* into) const {
  for (const auto& buffer : buffers_) {
    if (!buffer->flags) continue;
    for (uint64_t i = 0; i < buffer->length; ++i) {
      into->device_bytes_read_unique += buffer->flags[i] & 1;
      into->device_bytes_written_unique += buffer->flags[i] >> 1;
    }
  }
}

}  // namespace softmetal
