#include <algorithm>

#include "softmetal/foundation/collections.h"

namespace {

void check_object(id object, const char* method) {
  if (!object)
    [NSException raise:NSInvalidArgumentException format:@"*** %s: object cannot be nil", method];
}

void check_index(NSArray* array, size_t index, const char* method) {
  if (index >= array->_objects.size())
    softmetal::raise_range(method, index, array->_objects.size());
}

NSArray* array_of(std::vector<id> objects) {
  NSArray* array = [[NSArray alloc] init];
  array->_objects = std::move(objects);
  return array;
}

NSComparisonResult compare_by(SEL comparator, id first, id second) {
  return reinterpret_cast<NSComparisonResult (*)(id, SEL, id)>(
      [first methodForSelector:comparator])(first, comparator, second);
}

}  // namespace

namespace softmetal {

void raise_range(const char* method, size_t index, size_t count) {
  NSString* reason = [NSString stringWithFormat:@"*** %s: index %zu beyond bounds [0 .. %zd]",
                                                method, index, static_cast<ssize_t>(count) - 1];
  @throw [NSException exceptionWithName:NSRangeException reason:reason userInfo:nil];
}

std::string indented_description(id object) {
  std::string text = to_string([object description]);
  for (size_t at = 0; (at = text.find('\n', at)) != std::string::npos; at += 5)
    text.insert(at + 1, "    ");
  return text;
}

}  // namespace softmetal

@implementation NSEnumerator {
  std::vector<id> _objects;
  size_t _next;
}

- (instancetype)initWithObjects:(std::vector<id>)objects {
  self = [super init];
  _objects = std::move(objects);
  return self;
}
- (id)nextObject {
  return _next < _objects.size() ? _objects[_next++] : nil;
}
- (NSArray*)allObjects {
  NSArray* rest = array_of({_objects.begin() + static_cast<ptrdiff_t>(_next), _objects.end()});
  _next = _objects.size();
  return rest;
}
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState*)state
                                  objects:(id __unsafe_unretained*)buffer
                                    count:(NSUInteger)capacity {
  state->mutationsPtr = &state->extra[0];
  state->itemsPtr = buffer;
  NSUInteger count = 0;
  while (count < capacity && _next < _objects.size()) buffer[count++] = _objects[_next++];
  return count;
}

@end

@implementation NSArray

+ (instancetype)array {
  return [[self alloc] init];
}
+ (instancetype)arrayWithObject:(id)object {
  return [[self alloc] initWithObjects:&object count:1];
}
+ (instancetype)arrayWithObjects:(const id __unsafe_unretained[])objects count:(NSUInteger)count {
  return [[self alloc] initWithObjects:objects count:count];
}
+ (instancetype)arrayWithArray:(NSArray*)array {
  return [[self alloc] initWithArray:array];
}
+ (instancetype)arrayWithObjects:(id)first, ... {
  NSArray* array = [[self alloc] init];
  va_list rest;
  va_start(rest, first);
  for (id object = first; object; object = va_arg(rest, id)) array->_objects.push_back(object);
  va_end(rest);
  return array;
}
- (instancetype)init {
  return [super init];
}
- (instancetype)initWithObjects:(id)first, ... {
  self = [self init];
  va_list rest;
  va_start(rest, first);
  for (id object = first; object; object = va_arg(rest, id)) _objects.push_back(object);
  va_end(rest);
  return self;
}
- (instancetype)initWithObjects:(const id __unsafe_unretained[])objects count:(NSUInteger)count {
  self = [self init];
  for (NSUInteger i = 0; i < count; ++i) {
    check_object(objects[i], "-[NSArray initWithObjects:count:]");
    _objects.push_back(objects[i]);
  }
  return self;
}
- (instancetype)initWithArray:(NSArray*)array {
  self = [self init];
  if (array) _objects = array->_objects;
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (id)mutableCopyWithZone:(NSZone*)zone {
  return [[NSMutableArray alloc] initWithArray:self];
}

- (NSUInteger)count {
  return _objects.size();
}
- (id)objectAtIndex:(NSUInteger)index {
  check_index(self, index, "-[NSArray objectAtIndex:]");
  return _objects[index];
}
- (id)objectAtIndexedSubscript:(NSUInteger)index {
  check_index(self, index, "-[NSArray objectAtIndexedSubscript:]");
  return _objects[index];
}
- (id)firstObject {
  return _objects.empty() ? nil : _objects.front();
}
- (id)lastObject {
  return _objects.empty() ? nil : _objects.back();
}
- (NSUInteger)indexOfObject:(id)object {
  for (size_t i = 0; i < _objects.size(); ++i)
    if (softmetal::Equal()(_objects[i], object)) return i;
  return NSNotFound;
}
- (NSUInteger)indexOfObjectIdenticalTo:(id)object {
  const auto found = std::find(_objects.begin(), _objects.end(), object);
  return found == _objects.end() ? NSNotFound : static_cast<NSUInteger>(found - _objects.begin());
}
- (BOOL)containsObject:(id)object {
  return [self indexOfObject:object] != NSNotFound;
}
- (BOOL)isEqualToArray:(NSArray*)other {
  return other && std::equal(_objects.begin(), _objects.end(), other->_objects.begin(),
                             other->_objects.end(), softmetal::Equal());
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSArray class]] && [self isEqualToArray:object];
}
- (NSUInteger)hash {
  return _objects.size();
}

- (NSArray*)arrayByAddingObject:(id)object {
  check_object(object, "-[NSArray arrayByAddingObject:]");
  std::vector<id> objects = _objects;
  objects.push_back(object);
  return array_of(std::move(objects));
}
- (NSArray*)arrayByAddingObjectsFromArray:(NSArray*)array {
  std::vector<id> objects = _objects;
  if (array) objects.insert(objects.end(), array->_objects.begin(), array->_objects.end());
  return array_of(std::move(objects));
}
- (NSArray*)subarrayWithRange:(NSRange)range {
  if (NSMaxRange(range) > _objects.size())
    softmetal::raise_range("-[NSArray subarrayWithRange:]", NSMaxRange(range), _objects.size());
  const auto from = _objects.begin() + static_cast<ptrdiff_t>(range.location);
  return array_of({from, from + static_cast<ptrdiff_t>(range.length)});
}
- (NSString*)componentsJoinedByString:(NSString*)separator {
  std::string text;
  for (size_t i = 0; i < _objects.size(); ++i) {
    if (i) text += softmetal::to_string(separator);
    text += softmetal::to_string([_objects[i] description]);
  }
  return softmetal::to_nsstring(text);
}
- (NSArray*)sortedArrayUsingComparator:(NS_NOESCAPE NSComparator)comparator {
  std::vector<id> objects = _objects;
  std::sort(objects.begin(), objects.end(),
            [&](id first, id second) { return comparator(first, second) == NSOrderedAscending; });
  return array_of(std::move(objects));
}
- (NSArray*)sortedArrayUsingSelector:(SEL)comparator {
  return [self sortedArrayUsingComparator:^NSComparisonResult(id first, id second) {
    return compare_by(comparator, first, second);
  }];
}
- (NSEnumerator*)objectEnumerator {
  return [[NSEnumerator alloc] initWithObjects:_objects];
}
- (NSEnumerator*)reverseObjectEnumerator {
  return [[NSEnumerator alloc] initWithObjects:{_objects.rbegin(), _objects.rend()}];
}
- (void)enumerateObjectsUsingBlock:(void(NS_NOESCAPE ^)(id, NSUInteger, BOOL*))block {
  BOOL stop = NO;
  for (size_t i = 0; i < _objects.size() && !stop; ++i) block(_objects[i], i, &stop);
}
- (void)makeObjectsPerformSelector:(SEL)selector {
  for (id object : _objects)
    reinterpret_cast<void (*)(id, SEL)>([object methodForSelector:selector])(object, selector);
}
- (void)getObjects:(id __unsafe_unretained[])objects range:(NSRange)range {
  for (NSUInteger i = 0; i < range.length; ++i) objects[i] = self[range.location + i];
}
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState*)state
                                  objects:(id __unsafe_unretained*)buffer
                                    count:(NSUInteger)capacity {
  if (state->state) return 0;
  state->state = 1;
  state->mutationsPtr = &_mutations;
  state->itemsPtr = (id __unsafe_unretained*)(void*)_objects.data();
  return _objects.size();
}
- (NSString*)description {
  std::string text = "(";
  for (size_t i = 0; i < _objects.size(); ++i)
    text += (i ? ",\n    " : "\n    ") + softmetal::indented_description(_objects[i]);
  return softmetal::to_nsstring(text + "\n)");
}

@end

@implementation NSMutableArray

+ (instancetype)arrayWithCapacity:(NSUInteger)capacity {
  return [[self alloc] initWithCapacity:capacity];
}
- (instancetype)initWithCapacity:(NSUInteger)capacity {
  self = [self init];
  _objects.reserve(capacity);
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  return [[NSArray alloc] initWithArray:self];
}
- (void)addObject:(id)object {
  check_object(object, "-[NSMutableArray addObject:]");
  ++_mutations;
  _objects.push_back(object);
}
- (void)addObjectsFromArray:(NSArray*)array {
  if (!array) return;
  ++_mutations;
  const std::vector<id> added = array->_objects;
  _objects.insert(_objects.end(), added.begin(), added.end());
}
- (void)insertObject:(id)object atIndex:(NSUInteger)index {
  check_object(object, "-[NSMutableArray insertObject:atIndex:]");
  if (index > _objects.size())
    softmetal::raise_range("-[NSMutableArray insertObject:atIndex:]", index, _objects.size() + 1);
  ++_mutations;
  _objects.insert(_objects.begin() + static_cast<ptrdiff_t>(index), object);
}
- (void)replaceObjectAtIndex:(NSUInteger)index withObject:(id)object {
  check_object(object, "-[NSMutableArray replaceObjectAtIndex:withObject:]");
  check_index(self, index, "-[NSMutableArray replaceObjectAtIndex:withObject:]");
  _objects[index] = object;
}
- (void)setObject:(id)object atIndexedSubscript:(NSUInteger)index {
  if (index == _objects.size())
    [self addObject:object];
  else
    [self replaceObjectAtIndex:index withObject:object];
}
- (void)setArray:(NSArray*)array {
  ++_mutations;
  _objects = array ? array->_objects : std::vector<id>();
}
- (void)exchangeObjectAtIndex:(NSUInteger)first withObjectAtIndex:(NSUInteger)second {
  check_index(self, std::max(first, second), "-[NSMutableArray exchangeObjectAtIndex:]");
  std::swap(_objects[first], _objects[second]);
}
- (void)removeObject:(id)object {
  ++_mutations;
  std::erase_if(_objects, [&](id known) { return softmetal::Equal()(known, object); });
}
- (void)removeObjectIdenticalTo:(id)object {
  ++_mutations;
  std::erase_if(_objects, [&](id known) { return known == object; });
}
- (void)removeObjectAtIndex:(NSUInteger)index {
  check_index(self, index, "-[NSMutableArray removeObjectAtIndex:]");
  ++_mutations;
  _objects.erase(_objects.begin() + static_cast<ptrdiff_t>(index));
}
- (void)removeLastObject {
  ++_mutations;
  if (!_objects.empty()) _objects.pop_back();
}
- (void)removeAllObjects {
  ++_mutations;
  _objects.clear();
}
- (void)sortUsingComparator:(NS_NOESCAPE NSComparator)comparator {
  [self setArray:[self sortedArrayUsingComparator:comparator]];
}
- (void)sortUsingSelector:(SEL)comparator {
  [self setArray:[self sortedArrayUsingSelector:comparator]];
}

@end

// What clang makes of an empty literal.
extern "C" NSArray* const __NSArray0__;
NSArray* const __NSArray0__ = [[NSArray alloc] init];
