#pragma once

#import <Foundation/NSObjCRuntime.h>
#include <objc/runtime.h>

#ifdef __OBJC__
NS_ASSUME_NONNULL_BEGIN

@class NSString, NSMethodSignature;
typedef struct _NSZone NSZone;

@protocol NSObject
@property(readonly) NSUInteger hash;
@property(readonly) Class superclass;
@property(readonly, copy) NSString* description;
@property(readonly, copy) NSString* debugDescription;
- (BOOL)isEqual:(nullable id)object;
- (Class)class;
- (instancetype)self;
- (BOOL)isKindOfClass:(Class)cls;
- (BOOL)isMemberOfClass:(Class)cls;
- (BOOL)conformsToProtocol:(Protocol*)protocol;
- (BOOL)respondsToSelector:(SEL)selector;
- (id)performSelector:(SEL)selector;
- (id)performSelector:(SEL)selector withObject:(nullable id)object;
- (id)performSelector:(SEL)selector withObject:(nullable id)first withObject:(nullable id)second;
#if !__has_feature(objc_arc)
- (instancetype)retain;
- (oneway void)release;
- (instancetype)autorelease;
- (NSUInteger)retainCount;
#endif
@end

NS_ROOT_CLASS
@interface NSObject <NSObject> {
  Class isa;
}
+ (void)load;
+ (void)initialize;
+ (instancetype)alloc;
+ (instancetype)allocWithZone:(nullable NSZone*)zone;
+ (instancetype)new;
- (instancetype)init;
- (void)dealloc;
- (id)copy;
- (id)mutableCopy;
+ (Class)class;
+ (Class)superclass;
+ (BOOL)isSubclassOfClass:(Class)cls;
+ (BOOL)instancesRespondToSelector:(SEL)selector;
+ (BOOL)conformsToProtocol:(Protocol*)protocol;
+ (IMP)instanceMethodForSelector:(SEL)selector;
- (IMP)methodForSelector:(SEL)selector;
- (void)doesNotRecognizeSelector:(SEL)selector;
+ (NSString*)description;
// Null: there is no forwarding of messages.
- (nullable NSMethodSignature*)methodSignatureForSelector:(SEL)selector;
@end

@protocol NSCopying
- (id)copyWithZone:(nullable NSZone*)zone;
@end
@protocol NSMutableCopying
- (id)mutableCopyWithZone:(nullable NSZone*)zone;
@end
@protocol NSLocking
- (void)lock;
- (void)unlock;
@end

@interface Protocol : NSObject
@end

FOUNDATION_EXPORT id NSAllocateObject(Class cls, NSUInteger extraBytes,
                                      NSZone* _Nullable zone) NS_RETURNS_RETAINED;

NS_ASSUME_NONNULL_END
#endif
