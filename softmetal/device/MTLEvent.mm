#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "softmetal/device/device.h"

@implementation MTLSharedEventListener

@synthesize dispatchQueue = _dispatchQueue;

- (instancetype)init {
  return [self initWithDispatchQueue:dispatch_queue_create("MTLSharedEventListener", nullptr)];
}
- (instancetype)initWithDispatchQueue:(dispatch_queue_t)dispatchQueue {
  self = [super init];
  _dispatchQueue = dispatchQueue;
  return self;
}
+ (MTLSharedEventListener*)sharedListener {
  static MTLSharedEventListener* listener = [[MTLSharedEventListener alloc] init];
  return listener;
}

@end

namespace {

struct Notification {
  uint64_t value;
  MTLSharedEventListener* listener;
  MTLSharedEventNotificationBlock block;
};

}  // namespace

@implementation SoftmetalEvent {
  SoftmetalDevice* _device;
  std::mutex _mutex;
  std::condition_variable _changed;
  uint64_t _value;
  std::vector<Notification> _notifications;
}
@synthesize label = _label;

- (instancetype)initWithDevice:(SoftmetalDevice*)device {
  self = [super init];
  _device = device;
  return self;
}
- (id<MTLDevice>)device {
  return _device;
}
- (uint64_t)signaledValue {
  const std::lock_guard lock(_mutex);
  return _value;
}
- (void)setSignaledValue:(uint64_t)value {
  std::vector<Notification> due;
  {
    const std::lock_guard lock(_mutex);
    _value = value;
    std::erase_if(_notifications, [&](const Notification& each) {
      if (each.value > value) return false;
      due.push_back(each);
      return true;
    });
    _changed.notify_all();
  }
  for (const Notification& each : due) [self softmetal_notify:each at:value];
}
- (void)softmetal_notify:(const Notification&)notification at:(uint64_t)value {
  MTLSharedEventNotificationBlock block = notification.block;
  dispatch_async(notification.listener.dispatchQueue, ^{
    block(self, value);
  });
}
- (void)notifyListener:(MTLSharedEventListener*)listener
               atValue:(uint64_t)value
                 block:(MTLSharedEventNotificationBlock)block {
  const Notification notification = {value, listener, [block copy]};
  uint64_t now;
  {
    const std::lock_guard lock(_mutex);
    now = _value;
    if (now < value) _notifications.push_back(notification);
  }
  if (now >= value) [self softmetal_notify:notification at:now];
}
- (BOOL)waitUntilSignaledValue:(uint64_t)value timeoutMS:(uint64_t)milliseconds {
  std::unique_lock lock(_mutex);
  // A year stands for ever; more would overflow the clock.
  const auto limit = std::chrono::milliseconds(std::min<uint64_t>(milliseconds, 31536000000));
  return _changed.wait_for(lock, limit, [&] { return _value >= value; });
}

@end

@implementation SoftmetalFence {
  SoftmetalDevice* _device;
}
@synthesize label = _label;

- (instancetype)initWithDevice:(SoftmetalDevice*)device {
  self = [super init];
  _device = device;
  return self;
}
- (id<MTLDevice>)device {
  return _device;
}

@end
