#include <cstring>

#include "softmetal/foundation/collections.h"

@implementation NSSet

+ (instancetype)set {
  return [[self alloc] init];
}
+ (instancetype)setWithObject:(id)object {
  return [[self alloc] initWithObjects:&object count:1];
}
+ (instancetype)setWithObjects:(id)first, ... {
  NSSet* set = [[self alloc] init];
  va_list rest;
  va_start(rest, first);
  for (id object = first; object; object = va_arg(rest, id)) set->_objects.insert(object);
  va_end(rest);
  return set;
}
+ (instancetype)setWithArray:(NSArray*)array {
  return [[self alloc] initWithArray:array];
}
- (instancetype)init {
  return [super init];
}
- (instancetype)initWithObjects:(const id __unsafe_unretained[])objects count:(NSUInteger)count {
  self = [self init];
  _objects.insert(objects, objects + count);
  return self;
}
- (instancetype)initWithArray:(NSArray*)array {
  self = [self init];
  for (id object in array) _objects.insert(object);
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (id)mutableCopyWithZone:(NSZone*)zone {
  NSMutableSet* copy = [[NSMutableSet alloc] init];
  copy->_objects = _objects;
  return copy;
}
- (NSUInteger)count {
  return _objects.size();
}
- (NSArray*)allObjects {
  NSMutableArray* all = [NSMutableArray arrayWithCapacity:_objects.size()];
  for (id object : _objects) [all addObject:object];
  return all;
}
- (id)member:(id)object {
  const auto found = _objects.find(object);
  return found == _objects.end() ? nil : *found;
}
- (BOOL)containsObject:(id)object {
  return object && _objects.contains(object);
}
- (id)anyObject {
  return _objects.empty() ? nil : *_objects.begin();
}
- (NSEnumerator*)objectEnumerator {
  return self.allObjects.objectEnumerator;
}
- (BOOL)isEqualToSet:(NSSet*)other {
  return other && _objects == other->_objects;
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSSet class]] && [self isEqualToSet:object];
}
- (NSUInteger)hash {
  return _objects.size();
}
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState*)state
                                  objects:(id __unsafe_unretained*)buffer
                                    count:(NSUInteger)capacity {
  return softmetal::enumerate(_objects, state, &_mutations, buffer, capacity,
                              [](id object) { return object; });
}
- (NSString*)description {
  std::string text = "{(";
  const char* separator = "\n    ";
  for (id object : _objects) {
    text += separator + softmetal::indented_description(object);
    separator = ",\n    ";
  }
  return softmetal::to_nsstring(text + "\n)}");
}

@end

@implementation NSMutableSet

+ (instancetype)setWithCapacity:(NSUInteger)capacity {
  return [[self alloc] initWithCapacity:capacity];
}
- (instancetype)initWithCapacity:(NSUInteger)capacity {
  self = [self init];
  _objects.reserve(capacity);
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  NSSet* copy = [[NSSet alloc] init];
  copy->_objects = _objects;
  return copy;
}
- (void)addObject:(id)object {
  if (!object)
    [NSException raise:NSInvalidArgumentException
                format:@"*** -[NSMutableSet addObject:]: object cannot be nil"];
  ++_mutations;
  _objects.insert(object);
}
- (void)addObjectsFromArray:(NSArray*)array {
  for (id object in array) [self addObject:object];
}
- (void)removeObject:(id)object {
  ++_mutations;
  if (object) _objects.erase(object);
}
- (void)removeAllObjects {
  ++_mutations;
  _objects.clear();
}

@end
