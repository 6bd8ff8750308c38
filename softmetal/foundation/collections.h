// Storage of the collections: automatic reference counting keeps what the standard containers hold.
#pragma once

#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "softmetal/foundation/internal.h"

namespace softmetal {

struct Hash {
  size_t operator()(id object) const { return [object hash]; }
};
struct Equal {
  bool operator()(id first, id second) const { return first == second || [first isEqual:second]; }
};
using ObjectMap = std::unordered_map<id, id, Hash, Equal>;
using ObjectSet = std::unordered_set<id, Hash, Equal>;

// Fast enumeration over a hashed container; `object_of` picks the key from an element.
template <typename Container, typename ObjectOf>
NSUInteger enumerate(const Container& container, NSFastEnumerationState* state,
                     unsigned long* mutations, id __unsafe_unretained* buffer, NSUInteger capacity,
                     ObjectOf object_of) {
  using Iterator = typename Container::const_iterator;
  static_assert(sizeof(Iterator) <= sizeof(state->extra) && std::is_trivially_copyable_v<Iterator>);
  Iterator at = container.begin();
  if (state->state == 0) {
    state->state = 1;
    state->mutationsPtr = mutations;
  } else {
    memcpy(static_cast<void*>(&at), state->extra, sizeof at);
  }
  NSUInteger count = 0;
  for (; at != container.end() && count < capacity; ++at) buffer[count++] = object_of(*at);
  memcpy(state->extra, static_cast<const void*>(&at), sizeof at);
  state->itemsPtr = buffer;
  return count;
}

std::string indented_description(id object);

}  // namespace softmetal

@interface NSArray () {
 @public
  std::vector<id> _objects;
  unsigned long _mutations;
}
@end

@interface NSDictionary () {
 @public
  softmetal::ObjectMap _entries;
  unsigned long _mutations;
}
@end

@interface NSSet () {
 @public
  softmetal::ObjectSet _objects;
  unsigned long _mutations;
}
@end

@interface NSEnumerator ()
- (instancetype)initWithObjects:(std::vector<id>)objects;
@end
