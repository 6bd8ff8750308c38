#include <cstdlib>

#include "softmetal/foundation/internal.h"

// Positions count bytes: texts outside ASCII are scanned correctly, but scanLocation differs.
@implementation NSScanner {
  std::string _text;
}

+ (instancetype)scannerWithString:(NSString*)string {
  return [[self alloc] initWithString:string];
}
- (instancetype)initWithString:(NSString*)string {
  self = [super init];
  _text = softmetal::to_string(string);
  self.charactersToBeSkipped = [NSCharacterSet whitespaceAndNewlineCharacterSet];
  return self;
}
- (NSString*)string {
  return softmetal::to_nsstring(_text);
}

- (NSUInteger)afterSkipped {
  NSUInteger at = _scanLocation;
  while (at < _text.size() && [_charactersToBeSkipped
                                  characterIsMember:static_cast<unsigned char>(_text[at])])
    ++at;
  return at;
}
- (BOOL)isAtEnd {
  return self.afterSkipped >= _text.size();
}
- (BOOL)scanString:(NSString*)string intoString:(NSString**)result {
  const NSUInteger at = self.afterSkipped;
  const std::string_view wanted = [string softmetal_utf8];
  if (wanted.empty() || std::string_view(_text).substr(at, wanted.size()) != wanted) return NO;
  _scanLocation = at + wanted.size();
  if (result) *result = string;
  return YES;
}
- (BOOL)scanUpToString:(NSString*)string intoString:(NSString**)result {
  const NSUInteger at = self.afterSkipped;
  const size_t end = std::min(_text.find([string softmetal_utf8], at), _text.size());
  if (end == at) return NO;
  _scanLocation = end;
  if (result) *result = softmetal::to_nsstring(std::string_view(_text).substr(at, end - at));
  return YES;
}
- (BOOL)scanInt:(int*)result {
  NSInteger value;
  if (![self scanInteger:&value]) return NO;
  if (result) *result = static_cast<int>(value);
  return YES;
}
- (BOOL)scanInteger:(NSInteger*)result {
  const char* start = _text.c_str() + self.afterSkipped;
  char* end;
  const NSInteger value = strtol(start, &end, 10);
  if (end == start) return NO;
  _scanLocation = static_cast<NSUInteger>(end - _text.c_str());
  if (result) *result = value;
  return YES;
}
- (BOOL)scanDouble:(double*)result {
  const char* start = _text.c_str() + self.afterSkipped;
  char* end;
  const double value = strtod(start, &end);
  if (end == start) return NO;
  _scanLocation = static_cast<NSUInteger>(end - _text.c_str());
  if (result) *result = value;
  return YES;
}

@end
