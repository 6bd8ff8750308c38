#include <pthread.h>

#include <algorithm>
#include <thread>

#include "softmetal/device/device.h"

namespace softmetal {

void Timeline::start() {
  std::thread([self = shared_from_this()] {
    pthread_setname_np(pthread_self(), "softmetal queue");
    self->work();
  }).detach();
}

void Timeline::close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  changed_.notify_all();
}

void Timeline::acquire() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return count_ < maximum_; });
  ++count_;
}

void Timeline::release() {
  const std::lock_guard lock(mutex_);
  --count_;
  changed_.notify_all();
}

std::shared_ptr<Timeline::Place> Timeline::enqueue() {
  auto place = std::make_shared<Place>();
  const std::lock_guard lock(mutex_);
  places_.push_back(place);
  return place;
}

void Timeline::commit(Place& place, SoftmetalCommandBuffer* command_buffer) {
  const std::lock_guard lock(mutex_);
  place.command_buffer = command_buffer;
  changed_.notify_all();
}

void Timeline::abandon(Place& place) {
  const std::lock_guard lock(mutex_);
  place.is_abandoned = true;
  changed_.notify_all();
}

void Timeline::work() {
  for (;;) {
    @autoreleasepool {
      SoftmetalCommandBuffer* next = nil;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] {
          while (!places_.empty() && places_.front()->is_abandoned) places_.pop_front();
          return places_.empty() ? is_closed_ : places_.front()->command_buffer != nil;
        });
        if (places_.empty()) return;
        next = places_.front()->command_buffer;
        // The command buffer holds its place, too: let go of it here, or neither would be freed.
        places_.front()->command_buffer = nil;
        places_.pop_front();
      }
      [next softmetal_execute];
    }
  }
}

}  // namespace softmetal

@implementation MTLCommandQueueDescriptor

- (instancetype)init {
  self = [super init];
  _maxCommandBufferCount = 64;
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  MTLCommandQueueDescriptor* copy = [[MTLCommandQueueDescriptor alloc] init];
  copy.maxCommandBufferCount = _maxCommandBufferCount;
  return copy;
}

@end

@implementation SoftmetalCommandQueue {
  SoftmetalDevice* _device;
  std::shared_ptr<softmetal::Timeline> _timeline;
}
@synthesize label = _label;

- (instancetype)initWithDevice:(SoftmetalDevice*)device maximum:(NSUInteger)maximum {
  self = [super init];
  _device = device;
  _timeline = std::make_shared<softmetal::Timeline>(maximum);
  _timeline->start();
  return self;
}
- (void)dealloc {
  _timeline->close();
}
- (std::shared_ptr<softmetal::Timeline>)softmetal_timeline {
  return _timeline;
}
- (id<MTLDevice>)device {
  return _device;
}
- (id<MTLCommandBuffer>)commandBuffer {
  return [[SoftmetalCommandBuffer alloc] initWithQueue:self
                                    retainedReferences:YES
                                          errorOptions:MTLCommandBufferErrorOptionNone];
}
- (id<MTLCommandBuffer>)commandBufferWithUnretainedReferences {
  return [[SoftmetalCommandBuffer alloc] initWithQueue:self
                                    retainedReferences:NO
                                          errorOptions:MTLCommandBufferErrorOptionNone];
}
- (id<MTLCommandBuffer>)commandBufferWithDescriptor:(MTLCommandBufferDescriptor*)descriptor {
  return [[SoftmetalCommandBuffer alloc] initWithQueue:self
                                    retainedReferences:descriptor.retainedReferences
                                          errorOptions:descriptor.errorOptions];
}
- (void)insertDebugCaptureBoundary {
}
// All memory of this device is resident, always.
- (void)addResidencySet:(id<MTLResidencySet>)residencySet {
}
- (void)addResidencySets:(const id<MTLResidencySet>[])residencySets count:(NSUInteger)count {
}
- (void)removeResidencySet:(id<MTLResidencySet>)residencySet {
}
- (void)removeResidencySets:(const id<MTLResidencySet>[])residencySets count:(NSUInteger)count {
}

@end
