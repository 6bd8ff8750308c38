#include "softmetal/device/device.h"

using softmetal::misuse;
using softmetal::Reference;

namespace {

// A range of a buffer in multiples of 4 bytes, as macOS wants it.
void check_range(const char* method, id<MTLBuffer> buffer, const char* name, NSUInteger offset,
                 NSUInteger size) {
  const auto text = [](NSUInteger x) { return "(" + std::to_string(x) + ")"; };
  if (!buffer) misuse(method, std::string(name) + " must not be nil.");
  if (offset % 4 != 0 || size % 4 != 0) {
    misuse(method, "offset" + text(offset) + " and size" + text(size) + " of " + name +
                       " must be multiples of 4.");
  }
  if (size > buffer.length || offset > buffer.length - size) {
    misuse(method, "offset" + text(offset) + " + size" + text(size) + " must be <= " + name +
                       ".length" + text(buffer.length) + ".");
  }
}

}  // namespace

@implementation SoftmetalBlitCommandEncoder

- (instancetype)initWithCommandBuffer:(SoftmetalCommandBuffer*)commandBuffer {
  return [super initWithCommandBuffer:commandBuffer
                               method:"-[MTLDebugCommandBuffer blitCommandEncoder]"];
}
- (Reference)softmetal_reference:(id<MTLBuffer>)buffer offset:(NSUInteger)offset {
  return Reference(static_cast<SoftmetalBuffer*>(buffer), offset,
                   self.softmetal_commandBuffer.retainedReferences);
}
- (void)copyFromBuffer:(id<MTLBuffer>)sourceBuffer
          sourceOffset:(NSUInteger)sourceOffset
              toBuffer:(id<MTLBuffer>)destinationBuffer
     destinationOffset:(NSUInteger)destinationOffset
                  size:(NSUInteger)size {
  const char* method = "-[MTLDebugBlitCommandEncoder "
                       "copyFromBuffer:sourceOffset:toBuffer:destinationOffset:size:]";
  [self softmetal_check:method];
  check_range(method, sourceBuffer, "sourceBuffer", sourceOffset, size);
  check_range(method, destinationBuffer, "destinationBuffer", destinationOffset, size);
  if (sourceBuffer == destinationBuffer && sourceOffset < destinationOffset + size &&
      destinationOffset < sourceOffset + size) {
    misuse(method, "source and destination ranges overlap.");
  }
  const Reference from = [self softmetal_reference:sourceBuffer offset:sourceOffset];
  const Reference to = [self softmetal_reference:destinationBuffer offset:destinationOffset];
  [self softmetal_append:[from, to, size](double) -> NSError* {
    std::shared_ptr<void> keep_from, keep_to;
    const char* source = from.address(keep_from);
    if (!source) return from.used_after_release();
    char* destination = to.address(keep_to);
    if (!destination) return to.used_after_release();
    // Two no-copy buffers may be of the same memory.
    memmove(destination, source, size);
    return nil;
  }];
}
- (void)fillBuffer:(id<MTLBuffer>)buffer range:(NSRange)range value:(uint8_t)value {
  const char* method = "-[MTLDebugBlitCommandEncoder fillBuffer:range:value:]";
  [self softmetal_check:method];
  check_range(method, buffer, "buffer", range.location, range.length);
  const Reference to = [self softmetal_reference:buffer offset:range.location];
  [self softmetal_append:[to, length = range.length, value](double) -> NSError* {
    std::shared_ptr<void> keep;
    char* destination = to.address(keep);
    if (!destination) return to.used_after_release();
    memset(destination, value, length);
    return nil;
  }];
}
// Memory is the same for all; commands run one after another.
- (void)synchronizeResource:(id<MTLResource>)resource {
  [self softmetal_check:"-[MTLDebugBlitCommandEncoder synchronizeResource:]"];
}
- (void)updateFence:(id<MTLFence>)fence {
  [self softmetal_check:"-[MTLDebugBlitCommandEncoder updateFence:]"];
}
- (void)waitForFence:(id<MTLFence>)fence {
  [self softmetal_check:"-[MTLDebugBlitCommandEncoder waitForFence:]"];
}

@end
