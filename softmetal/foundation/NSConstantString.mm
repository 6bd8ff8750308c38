// String literals: objects that the compiler lays out in the program. Compiled without automatic
// reference counting, because they are never counted.
#include <mutex>
#include <unordered_map>

#include "softmetal/foundation/internal.h"

@interface NSConstantString : NSString {
  int _flags;  // 0x7c8: bytes in ASCII; 0x7d0: UTF-16
  const void* _characters;
  long _length;
}
@end

// The class of every literal.
asm(R"(
.globl __CFConstantStringClassReference
.set __CFConstantStringClassReference, OBJC_CLASS_$_NSConstantString
)");

@implementation NSConstantString

- (instancetype)retain {
  return self;
}
- (oneway void)release {
}
- (instancetype)autorelease {
  return self;
}
- (NSUInteger)retainCount {
  return NSUIntegerMax;
}

- (std::string_view)softmetal_utf8 {
  if (_flags == 0x7c8) return {static_cast<const char*>(_characters), static_cast<size_t>(_length)};
  static std::mutex& mutex = *new std::mutex;
  static auto& converted = *new std::unordered_map<const void*, std::string>;
  std::lock_guard lock(mutex);
  auto [entry, is_new] = converted.try_emplace(self);
  if (is_new)
    entry->second =
        softmetal::to_utf8(static_cast<const char16_t*>(_characters), static_cast<size_t>(_length));
  return entry->second;
}

@end
