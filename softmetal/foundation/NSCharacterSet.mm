#include <bitset>
#include <cctype>

#include "softmetal/foundation/internal.h"

@implementation NSCharacterSet {
  std::bitset<128> _members;
  BOOL _othersBelong;
}

static NSCharacterSet* with_members(int (*belongs)(int)) {
  NSCharacterSet* set = [[NSCharacterSet alloc] init];
  for (int c = 0; c < 128; ++c) set->_members[static_cast<size_t>(c)] = belongs(c);
  return set;
}

+ (NSCharacterSet*)whitespaceCharacterSet {
  return with_members([](int c) -> int { return c == ' ' || c == '\t'; });
}
+ (NSCharacterSet*)whitespaceAndNewlineCharacterSet {
  return with_members(isspace);
}
+ (NSCharacterSet*)newlineCharacterSet {
  return with_members([](int c) -> int { return c >= '\n' && c <= '\r'; });
}
+ (NSCharacterSet*)decimalDigitCharacterSet {
  return with_members(isdigit);
}
+ (NSCharacterSet*)alphanumericCharacterSet {
  return with_members(isalnum);
}
+ (NSCharacterSet*)letterCharacterSet {
  return with_members(isalpha);
}
+ (NSCharacterSet*)characterSetWithCharactersInString:(NSString*)characters {
  NSCharacterSet* set = [[NSCharacterSet alloc] init];
  for (const char c : [characters softmetal_utf8])
    if (!(c & 0x80)) set->_members.set(static_cast<size_t>(c));
  return set;
}
- (NSCharacterSet*)invertedSet {
  NSCharacterSet* set = [[NSCharacterSet alloc] init];
  set->_members = ~_members;
  set->_othersBelong = !_othersBelong;
  return set;
}
- (BOOL)characterIsMember:(unichar)character {
  return character < 128 ? _members[character] : _othersBelong;
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}

@end
