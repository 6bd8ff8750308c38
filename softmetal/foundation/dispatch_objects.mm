// Reference counts of dispatch objects for programs that count by hand. Compiled without automatic
// reference counting.
#include <dispatch/dispatch.h>

// DISPATCH_QUEUE_CONCURRENT is the address of a constant object, which is never counted.
@interface OS_dispatch_queue_attr : NSObject
@end

@implementation OS_dispatch_queue_attr
- (instancetype)retain {
  return self;
}
- (oneway void)release {
}
- (instancetype)autorelease {
  return self;
}
@end

extern "C" {

extern struct objc_object attr_class __asm__("OBJC_CLASS_$_OS_dispatch_queue_attr");
struct objc_object _dispatch_queue_attr_concurrent = {reinterpret_cast<Class>(&attr_class)};

void dispatch_retain(dispatch_object_t object) { [object retain]; }
void dispatch_release(dispatch_object_t object) { [object release]; }
}
