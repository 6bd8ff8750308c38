#include <stdlib.h>

#include "softmetal/device/device.h"

using softmetal::misuse;

namespace softmetal {

Reference::Reference(SoftmetalBuffer* buffer, size_t offset, bool is_retained)
    : offset_(offset), length_(buffer.length - offset), label_(buffer.label) {
  const std::shared_ptr<Memory> memory = buffer.softmetal_memory;
  address_ = memory->address();
  weak_ = memory;
  if (is_retained) strong_ = memory;
}

Reference::Reference(const void* bytes, size_t length) : length_(length), is_bytes_(true) {
  // Any vector may be read from it; no byte more than there are, for AddressSanitizer.
  void* copy = nullptr;
  if (posix_memalign(&copy, 64, length) != 0) throw std::bad_alloc();
  memcpy(copy, bytes, length);
  strong_ = std::shared_ptr<void>(copy, free);
  weak_ = strong_;
  address_ = static_cast<char*>(copy);
}

Reference Reference::at(size_t offset) const {
  Reference other = *this;
  other.length_ = offset_ + length_ - offset;
  other.offset_ = offset;
  return other;
}

char* Reference::address(std::shared_ptr<void>& keep) const {
  keep = weak_.lock();
  return keep ? address_ + offset_ : nullptr;
}

NSError* Reference::used_after_release() const {
  return command_buffer_error(
      MTLCommandBufferErrorInvalidResource,
      "Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource): buffer \"" +
          to_string(label_) +
          "\" was released before the command buffer, which does not retain "
          "what it uses, had completed");
}

}  // namespace softmetal

@implementation SoftmetalCommandEncoder {
  SoftmetalCommandBuffer* _commandBuffer;
  std::shared_ptr<softmetal::Pass> _pass;  // null when encoding has ended
  NSUInteger _debugGroups;
}
@synthesize label = _label;

- (instancetype)initWithCommandBuffer:(SoftmetalCommandBuffer*)commandBuffer
                               method:(const char*)method {
  self = [super init];
  _commandBuffer = commandBuffer;
  _pass = [commandBuffer softmetal_beginEncoding:method];
  return self;
}
- (void)dealloc {
  // An exception may have passed its endEncoding by: that one is the misuse to hear of.
  if (!_pass || softmetal::misuse_was_raised()) return;
  misuse("-[MTLCommandEncoder dealloc]", "Command encoder released without endEncoding");
}
- (SoftmetalCommandBuffer*)softmetal_commandBuffer {
  return _commandBuffer;
}
- (id<MTLDevice>)device {
  return _commandBuffer.device;
}
- (void)softmetal_check:(const char*)method {
  if (!_pass) misuse(method, "encoding has ended: endEncoding was called before.");
}
- (void)softmetal_append:(std::function<NSError*(double)>)command {
  _pass->commands.push_back(std::move(command));
}
- (void)endEncoding {
  [self softmetal_check:"-[MTLDebugCommandEncoder endEncoding]"];
  _pass->label = self.label;
  _pass = nullptr;
  [_commandBuffer softmetal_endEncoding];
}
- (void)insertDebugSignpost:(NSString*)string {
  [self softmetal_check:"-[MTLDebugCommandEncoder insertDebugSignpost:]"];
  [_pass->signposts addObject:string];
}
- (void)pushDebugGroup:(NSString*)string {
  ++_debugGroups;
}
- (void)popDebugGroup {
  if (_debugGroups == 0) {
    misuse("-[MTLDebugCommandEncoder popDebugGroup]", "popDebugGroup without pushDebugGroup.");
  }
  --_debugGroups;
}

@end
