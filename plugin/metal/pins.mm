#include "metal/pins.h"

#include <unistd.h>

#include <string>

#include "metal/error.h"

namespace jax_gluon::metal {

BufferRange lend(id<MTLDevice> device, const void* address, size_t bytes) {
  const auto page = static_cast<size_t>(getpagesize());
  const size_t before = reinterpret_cast<uintptr_t>(address) % page;
  char* begin = static_cast<char*>(const_cast<void*>(address)) - before;
  return {[device newBufferWithBytesNoCopy:begin
                                    length:(before + bytes + page - 1) / page * page
                                   options:MTLResourceStorageModeShared
                               deallocator:nil],
          before};
}

int64_t Pins::pin(const void* address, size_t bytes) {
  BufferRange range = lend(device_, address, bytes);
  if (!range.buffer) {
    range = {[device_ newBufferWithBytes:address length:bytes options:MTLResourceStorageModeShared],
             0};
  }
  if (!range.buffer) {
    throw Error("Metal has no memory to pin an array of " + std::to_string(bytes) + " bytes");
  }
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const std::lock_guard lock(mutex_);
  pins_[++last_] = {begin, begin + bytes, range};
  return last_;
}

void Pins::unpin(int64_t number) {
  const std::lock_guard lock(mutex_);
  pins_.erase(number);
}

int64_t Pins::uses(int64_t number) {
  const std::lock_guard lock(mutex_);
  const auto found = pins_.find(number);
  return found == pins_.end() ? 0 : found->second.uses;
}

BufferRange Pins::find(const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const std::lock_guard lock(mutex_);
  for (auto& [number, pin] : pins_) {
    if (begin < pin.begin || begin + bytes > pin.end) continue;
    ++pin.uses;
    return {pin.range.buffer, pin.range.offset + (begin - pin.begin)};
  }
  return {};
}

}  // namespace jax_gluon::metal
