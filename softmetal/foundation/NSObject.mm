// The root class, blocks as objects, and autorelease pools. Compiled without automatic reference
// counting, which forbids to implement -retain.
#include <Block.h>

#include "softmetal/foundation/internal.h"
#include "softmetal/runtime/abi.h"

extern "C" {
void softmetal_objc_retain(id object);
void softmetal_objc_release(id object);
void softmetal_objc_autorelease(id object);
uint64_t softmetal_objc_retain_count(id object);
extern void* _NSConcreteGlobalBlock[32];
extern void* _NSConcreteStackBlock[32];
extern void* _NSConcreteMallocBlock[32];
}

@implementation NSObject

+ (void)load {
}
+ (void)initialize {
}
+ (instancetype)alloc {
  return [self allocWithZone:nullptr];
}
+ (instancetype)allocWithZone:(NSZone*)zone {
  return class_createInstance(self, 0);
}
+ (instancetype)new {
  return [[self alloc] init];
}
- (instancetype)init {
  return self;
}
- (void)dealloc {
  object_dispose(self);
}
- (id)copy {
  return [(id<NSCopying>)self copyWithZone:nullptr];
}
- (id)mutableCopy {
  return [(id<NSMutableCopying>)self mutableCopyWithZone:nullptr];
}

- (instancetype)retain {
  softmetal_objc_retain(self);
  return self;
}
- (oneway void)release {
  softmetal_objc_release(self);
}
- (instancetype)autorelease {
  softmetal_objc_autorelease(self);
  return self;
}
- (NSUInteger)retainCount {
  return softmetal_objc_retain_count(self);
}
// Classes are never freed.
+ (id)retain {
  return self;
}
+ (oneway void)release {
}
+ (id)autorelease {
  return self;
}
+ (NSUInteger)retainCount {
  return NSUIntegerMax;
}
+ (id)copyWithZone:(NSZone*)zone {
  return self;
}

+ (Class)class {
  return self;
}
- (Class)class {
  return object_getClass(self);
}
+ (Class)superclass {
  return class_getSuperclass(self);
}
- (Class)superclass {
  return class_getSuperclass(object_getClass(self));
}
- (instancetype)self {
  return self;
}
+ (BOOL)isSubclassOfClass:(Class)cls {
  for (Class ancestor = self; ancestor; ancestor = class_getSuperclass(ancestor))
    if (ancestor == cls) return YES;
  return NO;
}
- (BOOL)isKindOfClass:(Class)cls {
  return [object_getClass(self) isSubclassOfClass:cls];
}
- (BOOL)isMemberOfClass:(Class)cls {
  return object_getClass(self) == cls;
}
+ (BOOL)isKindOfClass:(Class)cls {
  for (Class ancestor = object_getClass(self); ancestor; ancestor = class_getSuperclass(ancestor))
    if (ancestor == cls) return YES;
  return NO;
}
+ (BOOL)conformsToProtocol:(Protocol*)protocol {
  for (Class cls = self; cls; cls = class_getSuperclass(cls))
    if (class_conformsToProtocol(cls, protocol)) return YES;
  return NO;
}
- (BOOL)conformsToProtocol:(Protocol*)protocol {
  return [object_getClass(self) conformsToProtocol:protocol];
}
- (BOOL)respondsToSelector:(SEL)selector {
  return class_respondsToSelector(object_getClass(self), selector);
}
+ (BOOL)respondsToSelector:(SEL)selector {
  return class_respondsToSelector(object_getClass(self), selector);
}
+ (BOOL)instancesRespondToSelector:(SEL)selector {
  return class_respondsToSelector(self, selector);
}
+ (IMP)instanceMethodForSelector:(SEL)selector {
  return class_getMethodImplementation(self, selector);
}
- (IMP)methodForSelector:(SEL)selector {
  return class_getMethodImplementation(object_getClass(self), selector);
}
- (NSMethodSignature*)methodSignatureForSelector:(SEL)selector {
  return nil;
}
- (id)performSelector:(SEL)selector {
  return softmetal::objc::send(self, selector);
}
- (id)performSelector:(SEL)selector withObject:(id)object {
  return softmetal::objc::send(self, selector, object);
}
- (id)performSelector:(SEL)selector withObject:(id)first withObject:(id)second {
  return softmetal::objc::send(self, selector, first, second);
}

- (void)doesNotRecognizeSelector:(SEL)selector {
  [NSException raise:NSInvalidArgumentException
              format:@"-[%s %s]: unrecognized selector sent to instance %p",
                     object_getClassName(self), sel_getName(selector), self];
}
+ (void)doesNotRecognizeSelector:(SEL)selector {
  [NSException raise:NSInvalidArgumentException
              format:@"+[%s %s]: unrecognized selector sent to class %p", class_getName(self),
                     sel_getName(selector), self];
}
- (void)softmetal_mutatedWhileEnumerated {
  [NSException raise:NSGenericException
              format:@"*** Collection <%s: %p> was mutated while being enumerated.",
                     object_getClassName(self), self];
}

- (BOOL)isEqual:(id)object {
  return self == object;
}
- (NSUInteger)hash {
  return reinterpret_cast<NSUInteger>(self) >> 4;
}
+ (NSUInteger)hash {
  return reinterpret_cast<NSUInteger>(self) >> 4;
}
+ (BOOL)isEqual:(id)object {
  return self == object;
}
+ (NSString*)description {
  return NSStringFromClass(self);
}
- (NSString*)description {
  return [NSString stringWithFormat:@"<%s: %p>", object_getClassName(self), self];
}
- (NSString*)debugDescription {
  return self.description;
}

@end

@implementation Protocol
- (instancetype)retain {
  return self;
}
- (oneway void)release {
}
- (instancetype)autorelease {
  return self;
}
@end

// --- Blocks ---

@interface NSBlock : NSObject <NSCopying>
@end

@implementation NSBlock

// The block classes of the block ABI are arrays that libraries name; they become this class's
// twins.
+ (void)load {
  for (void** concrete : {_NSConcreteGlobalBlock, _NSConcreteStackBlock, _NSConcreteMallocBlock})
    memcpy(static_cast<void*>(concrete), static_cast<void*>([NSBlock class]), sizeof(objc_class));
}
- (instancetype)retain {
  return static_cast<id>(_Block_copy(self));
}
- (oneway void)release {
  _Block_release(self);
}
- (instancetype)autorelease {
  softmetal_objc_autorelease(self);
  return self;
}
- (NSUInteger)retainCount {
  return 1;
}
- (id)copyWithZone:(NSZone*)zone {
  return static_cast<id>(_Block_copy(self));
}

@end

// --- Autorelease pools ---

@implementation NSAutoreleasePool

- (instancetype)init {
  _token = objc_autoreleasePoolPush();
  return self;
}
+ (void)addObject:(id)object {
  [object autorelease];
}
- (void)addObject:(id)object {
  [object autorelease];
}
- (void)drain {
  [self release];
}
- (instancetype)autorelease {
  @throw [NSException
      exceptionWithName:NSInvalidArgumentException
                 reason:
                     @"*** -[NSAutoreleasePool autorelease]: Cannot autorelease an autorelease pool"
               userInfo:nil];
}
- (void)dealloc {
  objc_autoreleasePoolPop(_token);
  [super dealloc];
}

@end

id NSAllocateObject(Class cls, NSUInteger extraBytes, NSZone*) {
  return class_createInstance(cls, extraBytes);
}
