#pragma once

#import <Foundation/NSObject.h>

#if __has_feature(objc_arc)
__attribute__((unavailable("use @autoreleasepool")))
#endif
@interface NSAutoreleasePool : NSObject {
  void* _token;
}
+ (void)addObject:(id)object;
- (void)addObject:(id)object;
- (void)drain;
@end
