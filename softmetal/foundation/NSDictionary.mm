#include <cstring>

#include "softmetal/foundation/collections.h"

namespace {

void insert(softmetal::ObjectMap& entries, id key, id object) {
  if (!key || !object)
    [NSException raise:NSInvalidArgumentException
                format:@"*** -[NSDictionary setObject:forKey:]: %s cannot be nil (key: %@)",
                       key ? "object" : "key", key];
  entries[[key copy]] = object;
}

}  // namespace

@implementation NSDictionary

+ (instancetype)dictionary {
  return [[self alloc] init];
}
+ (instancetype)dictionaryWithObject:(id)object forKey:(id)key {
  return [[self alloc] initWithObjects:&object forKeys:&key count:1];
}
+ (instancetype)dictionaryWithObjects:(const id __unsafe_unretained[])objects
                              forKeys:(const id<NSCopying> __unsafe_unretained[])keys
                                count:(NSUInteger)count {
  return [[self alloc] initWithObjects:objects forKeys:keys count:count];
}
+ (instancetype)dictionaryWithObjects:(NSArray*)objects forKeys:(NSArray*)keys {
  NSDictionary* dictionary = [[self alloc] init];
  for (NSUInteger i = 0; i < keys.count; ++i) insert(dictionary->_entries, keys[i], objects[i]);
  return dictionary;
}
+ (instancetype)dictionaryWithDictionary:(NSDictionary*)other {
  return [[self alloc] initWithDictionary:other];
}
+ (instancetype)dictionaryWithObjectsAndKeys:(id)firstObject, ... {
  NSDictionary* dictionary = [[self alloc] init];
  va_list rest;
  va_start(rest, firstObject);
  for (id object = firstObject; object; object = va_arg(rest, id))
    insert(dictionary->_entries, va_arg(rest, id), object);
  va_end(rest);
  return dictionary;
}
- (instancetype)init {
  return [super init];
}
- (instancetype)initWithObjects:(const id __unsafe_unretained[])objects
                        forKeys:(const id<NSCopying> __unsafe_unretained[])keys
                          count:(NSUInteger)count {
  self = [self init];
  for (NSUInteger i = 0; i < count; ++i) insert(_entries, keys[i], objects[i]);
  return self;
}
- (instancetype)initWithObjectsAndKeys:(id)firstObject, ... {
  self = [self init];
  va_list rest;
  va_start(rest, firstObject);
  for (id object = firstObject; object; object = va_arg(rest, id))
    insert(_entries, va_arg(rest, id), object);
  va_end(rest);
  return self;
}
- (instancetype)initWithDictionary:(NSDictionary*)other {
  self = [self init];
  if (other) _entries = other->_entries;
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (id)mutableCopyWithZone:(NSZone*)zone {
  return [[NSMutableDictionary alloc] initWithDictionary:self];
}

- (NSUInteger)count {
  return _entries.size();
}
- (id)objectForKey:(id)key {
  const auto found = key ? _entries.find(key) : _entries.end();
  return found == _entries.end() ? nil : found->second;
}
- (id)objectForKeyedSubscript:(id)key {
  return [self objectForKey:key];
}
- (id)valueForKey:(NSString*)key {
  return [self objectForKey:key];
}
- (NSArray*)allKeys {
  NSMutableArray* keys = [NSMutableArray arrayWithCapacity:_entries.size()];
  for (const auto& [key, object] : _entries) [keys addObject:key];
  return keys;
}
- (NSArray*)allValues {
  NSMutableArray* values = [NSMutableArray arrayWithCapacity:_entries.size()];
  for (const auto& [key, object] : _entries) [values addObject:object];
  return values;
}
- (NSEnumerator*)keyEnumerator {
  return self.allKeys.objectEnumerator;
}
- (NSEnumerator*)objectEnumerator {
  return self.allValues.objectEnumerator;
}
- (void)enumerateKeysAndObjectsUsingBlock:(void(NS_NOESCAPE ^)(id, id, BOOL*))block {
  BOOL stop = NO;
  for (const auto& [key, object] : _entries) {
    block(key, object, &stop);
    if (stop) return;
  }
}
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState*)state
                                  objects:(id __unsafe_unretained*)buffer
                                    count:(NSUInteger)capacity {
  return softmetal::enumerate(_entries, state, &_mutations, buffer, capacity,
                              [](const auto& entry) { return entry.first; });
}
- (BOOL)isEqualToDictionary:(NSDictionary*)other {
  if (other.count != _entries.size()) return NO;
  for (const auto& [key, object] : _entries)
    if (!softmetal::Equal()(object, other[key])) return NO;
  return YES;
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSDictionary class]] && [self isEqualToDictionary:object];
}
- (NSUInteger)hash {
  return _entries.size();
}
- (NSString*)description {
  std::string text = "{";
  for (const auto& [key, object] : _entries)
    text += "\n    " + softmetal::to_string([key description]) + " = " +
            softmetal::indented_description(object) + ";";
  return softmetal::to_nsstring(text + "\n}");
}

@end

@implementation NSMutableDictionary

+ (instancetype)dictionaryWithCapacity:(NSUInteger)capacity {
  return [[self alloc] initWithCapacity:capacity];
}
- (instancetype)initWithCapacity:(NSUInteger)capacity {
  self = [self init];
  _entries.reserve(capacity);
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  return [[NSDictionary alloc] initWithDictionary:self];
}
- (void)setObject:(id)object forKey:(id)key {
  ++_mutations;
  insert(_entries, key, object);
}
- (void)setObject:(id)object forKeyedSubscript:(id)key {
  if (object)
    [self setObject:object forKey:key];
  else
    [self removeObjectForKey:key];
}
- (void)setValue:(id)value forKey:(NSString*)key {
  [self setObject:value forKeyedSubscript:key];
}
- (void)removeObjectForKey:(id)key {
  ++_mutations;
  if (key) _entries.erase(key);
}
- (void)removeAllObjects {
  ++_mutations;
  _entries.clear();
}
- (void)addEntriesFromDictionary:(NSDictionary*)dictionary {
  ++_mutations;
  for (id key in dictionary) insert(_entries, key, dictionary[key]);
}

@end

// What clang makes of an empty literal.
extern "C" NSDictionary* const __NSDictionary0__;
NSDictionary* const __NSDictionary0__ = [[NSDictionary alloc] init];
