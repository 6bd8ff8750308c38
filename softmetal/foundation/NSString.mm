// NSString, kept in UTF-8. Literals are laid out by the compiler (NSConstantString.mm).
#include <strings.h>
#include <algorithm>
#include <cstring>

#include "softmetal/foundation/internal.h"

namespace softmetal {

size_t utf16_length(std::string_view text) {
  size_t length = 0;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte & 0xc0) != 0x80) ++length;  // the first byte of a code point
    if ((byte & 0xf8) == 0xf0) ++length;  // one outside the basic plane: two units
  }
  return length;
}

std::u16string to_utf16(std::string_view text) {
  std::u16string units;
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const int extra = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    char32_t point = extra == 0 ? lead : lead & (0x3f >> extra);
    for (int k = 1; k <= extra && i + static_cast<size_t>(k) < text.size(); ++k)
      point = point << 6 | (static_cast<unsigned char>(text[i + static_cast<size_t>(k)]) & 0x3f);
    i += static_cast<size_t>(extra) + 1;
    if (point >= 0x10000) {
      units += static_cast<char16_t>(0xd800 + ((point - 0x10000) >> 10));
      units += static_cast<char16_t>(0xdc00 + ((point - 0x10000) & 0x3ff));
    } else {
      units += static_cast<char16_t>(point);
    }
  }
  return units;
}

std::string to_utf8(const char16_t* text, size_t length) {
  std::string bytes;
  for (size_t i = 0; i < length; ++i) {
    char32_t point = text[i];
    if (point >= 0xd800 && point < 0xdc00 && i + 1 < length)
      point = 0x10000 + ((point - 0xd800) << 10) + (text[++i] - 0xdc00u);
    if (point < 0x80) {
      bytes += static_cast<char>(point);
    } else {
      const int extra = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
      bytes += static_cast<char>((0xff << (7 - extra) & 0xff) | point >> (6 * extra));
      for (int k = extra - 1; k >= 0; --k)
        bytes += static_cast<char>(0x80 | (point >> 6 * k & 0x3f));
    }
  }
  return bytes;
}

}  // namespace softmetal

namespace {

using softmetal::to_nsstring;
using softmetal::to_string;

bool is_ascii(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](char c) { return c & 0x80; });
}

// Byte offset of a UTF-16 index.
size_t byte_offset(std::string_view text, size_t index) {
  if (is_ascii(text)) return index;
  size_t units = 0, offset = 0;
  while (offset < text.size() && units < index) {
    const auto lead = static_cast<unsigned char>(text[offset]);
    units += lead >= 0xf0 ? 2 : 1;
    offset += lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  }
  return offset;
}

bool same_ignoring_case(std::string_view a, std::string_view b) {
  return a.size() == b.size() && strncasecmp(a.data(), b.data(), a.size()) == 0;
}

size_t find(std::string_view text, std::string_view part, NSStringCompareOptions options) {
  if (part.empty() || part.size() > text.size()) return std::string_view::npos;
  const bool backwards = options & NSBackwardsSearch;
  if (options & NSAnchoredSearch) {
    const size_t at = backwards ? text.size() - part.size() : 0;
    const std::string_view piece = text.substr(at, part.size());
    return (options & NSCaseInsensitiveSearch ? same_ignoring_case(piece, part) : piece == part)
               ? at
               : std::string_view::npos;
  }
  if (!(options & NSCaseInsensitiveSearch)) return backwards ? text.rfind(part) : text.find(part);
  for (size_t k = 0; k + part.size() <= text.size(); ++k) {
    const size_t at = backwards ? text.size() - part.size() - k : k;
    if (same_ignoring_case(text.substr(at, part.size()), part)) return at;
  }
  return std::string_view::npos;
}

std::string replace_all(std::string text, std::string_view target, std::string_view replacement,
                        NSUInteger* count) {
  *count = 0;
  if (target.empty()) return text;
  for (size_t at = 0; (at = text.find(target, at)) != std::string::npos; at += replacement.size()) {
    text.replace(at, target.size(), replacement);
    ++*count;
  }
  return text;
}

NSComparisonResult order(int comparison) {
  return comparison < 0 ? NSOrderedAscending : comparison > 0 ? NSOrderedDescending : NSOrderedSame;
}

bool is_supported(NSStringEncoding encoding) {
  return encoding == NSUTF8StringEncoding || encoding == NSASCIIStringEncoding ||
         encoding == NSISOLatin1StringEncoding;
}

}  // namespace

// What NSString's initialisers make.
@interface SoftmetalString : NSString {
  std::string _text;
}
@end

@implementation NSString

+ (instancetype)allocWithZone:(NSZone*)zone {
  if (self == [NSString class]) return (id)[SoftmetalString allocWithZone:zone];
  return [super allocWithZone:zone];
}

// --- What subclasses provide ---

- (std::string_view)softmetal_utf8 {
  [self doesNotRecognizeSelector:_cmd];
  return {};
}
- (const char*)UTF8String {
  return [self softmetal_utf8].data();
}

// --- Making strings ---

+ (instancetype)string {
  return [[self alloc] init];
}
+ (instancetype)stringWithString:(NSString*)string {
  return [[self alloc] initWithString:string];
}
+ (instancetype)stringWithUTF8String:(const char*)text {
  return [[self alloc] initWithUTF8String:text];
}
+ (instancetype)stringWithCString:(const char*)text encoding:(NSStringEncoding)encoding {
  return [[self alloc] initWithCString:text encoding:encoding];
}
+ (instancetype)stringWithCharacters:(const unichar*)characters length:(NSUInteger)length {
  return [[self alloc] initWithCharacters:characters length:length];
}
+ (instancetype)stringWithFormat:(NSString*)format, ... {
  va_list arguments;
  va_start(arguments, format);
  NSString* string = [[self alloc] initWithFormat:format arguments:arguments];
  va_end(arguments);
  return string;
}
+ (instancetype)stringWithContentsOfFile:(NSString*)path
                                encoding:(NSStringEncoding)encoding
                                   error:(NSError**)error {
  return [[self alloc] initWithContentsOfFile:path encoding:encoding error:error];
}
+ (instancetype)stringWithContentsOfURL:(NSURL*)url
                               encoding:(NSStringEncoding)encoding
                                  error:(NSError**)error {
  return [[self alloc] initWithContentsOfFile:url.path encoding:encoding error:error];
}

- (instancetype)init {
  return [super init];
}
- (instancetype)initWithBytes:(const void*)bytes
                       length:(NSUInteger)length
                     encoding:(NSStringEncoding)encoding {
  [self doesNotRecognizeSelector:_cmd];
  return nil;
}
- (instancetype)initWithBytesNoCopy:(void*)bytes
                             length:(NSUInteger)length
                           encoding:(NSStringEncoding)encoding
                       freeWhenDone:(BOOL)freeWhenDone {
  self = [self initWithBytes:bytes length:length encoding:encoding];
  if (freeWhenDone) free(bytes);
  return self;
}
- (instancetype)initWithString:(NSString*)string {
  const std::string_view text = [string softmetal_utf8];
  return [self initWithBytes:text.data() length:text.size() encoding:NSUTF8StringEncoding];
}
- (instancetype)initWithUTF8String:(const char*)text {
  if (!text)
    [NSException raise:NSInvalidArgumentException
                format:@"*** -[NSString initWithUTF8String:]: NULL cString"];
  return [self initWithBytes:text length:strlen(text) encoding:NSUTF8StringEncoding];
}
- (instancetype)initWithCString:(const char*)text encoding:(NSStringEncoding)encoding {
  if (!text)
    [NSException raise:NSInvalidArgumentException
                format:@"*** -[NSString initWithCString:encoding:]: NULL cString"];
  return [self initWithBytes:text length:strlen(text) encoding:encoding];
}
- (instancetype)initWithCharacters:(const unichar*)characters length:(NSUInteger)length {
  const std::string text =
      softmetal::to_utf8(reinterpret_cast<const char16_t*>(characters), length);
  return [self initWithBytes:text.data() length:text.size() encoding:NSUTF8StringEncoding];
}
- (instancetype)initWithData:(NSData*)data encoding:(NSStringEncoding)encoding {
  return [self initWithBytes:data.bytes length:data.length encoding:encoding];
}
- (instancetype)initWithFormat:(NSString*)format, ... {
  va_list arguments;
  va_start(arguments, format);
  self = [self initWithFormat:format arguments:arguments];
  va_end(arguments);
  return self;
}
- (instancetype)initWithFormat:(NSString*)format arguments:(va_list)arguments {
  const std::string text = softmetal::format(format, arguments);
  return [self initWithBytes:text.data() length:text.size() encoding:NSUTF8StringEncoding];
}
- (instancetype)initWithContentsOfFile:(NSString*)path
                              encoding:(NSStringEncoding)encoding
                                 error:(NSError**)error {
  NSData* data = [NSData dataWithContentsOfFile:path options:0 error:error];
  if (!data) return nil;
  return [self initWithData:data encoding:encoding];
}
- (instancetype)initWithContentsOfURL:(NSURL*)url
                             encoding:(NSStringEncoding)encoding
                                error:(NSError**)error {
  return [self initWithContentsOfFile:url.path encoding:encoding error:error];
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (id)mutableCopyWithZone:(NSZone*)zone {
  return [[NSMutableString alloc] initWithString:self];
}

// --- Reading ---

- (NSUInteger)length {
  return softmetal::utf16_length([self softmetal_utf8]);
}
- (unichar)characterAtIndex:(NSUInteger)index {
  const std::string_view text = [self softmetal_utf8];
  if (is_ascii(text)) {
    if (index >= text.size())
      softmetal::raise_range("-[NSString characterAtIndex:]", index, text.size());
    return static_cast<unichar>(text[index]);
  }
  const std::u16string units = softmetal::to_utf16(text);
  if (index >= units.size())
    softmetal::raise_range("-[NSString characterAtIndex:]", index, units.size());
  return units[index];
}
- (const char*)cStringUsingEncoding:(NSStringEncoding)encoding {
  return is_supported(encoding) ? self.UTF8String : nullptr;
}
- (BOOL)getCString:(char*)buffer
         maxLength:(NSUInteger)capacity
          encoding:(NSStringEncoding)encoding {
  const std::string_view text = [self softmetal_utf8];
  if (!is_supported(encoding) || text.size() + 1 > capacity) return NO;
  memcpy(buffer, text.data(), text.size());
  buffer[text.size()] = 0;
  return YES;
}
- (NSUInteger)lengthOfBytesUsingEncoding:(NSStringEncoding)encoding {
  return is_supported(encoding) ? [self softmetal_utf8].size() : 0;
}
- (NSUInteger)maximumLengthOfBytesUsingEncoding:(NSStringEncoding)encoding {
  return encoding == NSUTF8StringEncoding ? self.length * 3 : self.length;
}
- (NSData*)dataUsingEncoding:(NSStringEncoding)encoding {
  if (!is_supported(encoding)) return nil;
  const std::string_view text = [self softmetal_utf8];
  return [NSData dataWithBytes:text.data() length:text.size()];
}

// --- Comparing and searching ---

- (BOOL)isEqual:(id)object {
  return self == object ||
         ([object isKindOfClass:[NSString class]] && [self isEqualToString:object]);
}
- (BOOL)isEqualToString:(NSString*)other {
  return other && [self softmetal_utf8] == [other softmetal_utf8];
}
- (NSUInteger)hash {
  return std::hash<std::string_view>()([self softmetal_utf8]);
}
- (NSComparisonResult)compare:(NSString*)other {
  return order([self softmetal_utf8].compare([other softmetal_utf8]));
}
- (NSComparisonResult)compare:(NSString*)other options:(NSStringCompareOptions)options {
  if (options & NSNumericSearch)
    return order(strverscmp(to_string(self).c_str(), to_string(other).c_str()));
  return options & NSCaseInsensitiveSearch ? [self caseInsensitiveCompare:other]
                                           : [self compare:other];
}
- (NSComparisonResult)caseInsensitiveCompare:(NSString*)other {
  return order(strcasecmp(to_string(self).c_str(), to_string(other).c_str()));
}
- (BOOL)hasPrefix:(NSString*)prefix {
  return [self softmetal_utf8].starts_with([prefix softmetal_utf8]);
}
- (BOOL)hasSuffix:(NSString*)suffix {
  return [self softmetal_utf8].ends_with([suffix softmetal_utf8]);
}
- (BOOL)containsString:(NSString*)part {
  return [self softmetal_utf8].find([part softmetal_utf8]) != std::string_view::npos;
}
- (NSRange)rangeOfString:(NSString*)part {
  return [self rangeOfString:part options:0];
}
- (NSRange)rangeOfString:(NSString*)part options:(NSStringCompareOptions)options {
  const std::string_view text = [self softmetal_utf8];
  const size_t at = find(text, [part softmetal_utf8], options);
  if (at == std::string_view::npos) return NSMakeRange(NSNotFound, 0);
  return NSMakeRange(softmetal::utf16_length(text.substr(0, at)), part.length);
}

// --- Deriving ---

- (NSString*)stringByAppendingString:(NSString*)string {
  return to_nsstring(to_string(self) + to_string(string));
}
- (NSString*)stringByAppendingFormat:(NSString*)format, ... {
  va_list arguments;
  va_start(arguments, format);
  NSString* string = to_nsstring(to_string(self) + softmetal::format(format, arguments));
  va_end(arguments);
  return string;
}
- (NSString*)substringWithRange:(NSRange)range {
  const std::string_view text = [self softmetal_utf8];
  const size_t length = softmetal::utf16_length(text);
  if (NSMaxRange(range) > length)
    softmetal::raise_range("-[NSString substringWithRange:]", NSMaxRange(range), length);
  const size_t from = byte_offset(text, range.location);
  return to_nsstring(text.substr(from, byte_offset(text, NSMaxRange(range)) - from));
}
- (NSString*)substringFromIndex:(NSUInteger)from {
  const NSUInteger length = self.length;
  if (from > length) softmetal::raise_range("-[NSString substringFromIndex:]", from, length);
  return [self substringWithRange:NSMakeRange(from, length - from)];
}
- (NSString*)substringToIndex:(NSUInteger)to {
  return [self substringWithRange:NSMakeRange(0, to)];
}
- (NSArray<NSString*>*)componentsSeparatedByString:(NSString*)separator {
  NSMutableArray* parts = [NSMutableArray array];
  const std::string_view mark = [separator softmetal_utf8];
  std::string_view rest = [self softmetal_utf8];
  for (size_t at; !mark.empty() && (at = rest.find(mark)) != std::string_view::npos;
       rest.remove_prefix(at + mark.size()))
    [parts addObject:to_nsstring(rest.substr(0, at))];
  [parts addObject:to_nsstring(rest)];
  return parts;
}
- (NSArray<NSString*>*)componentsSeparatedByCharactersInSet:(NSCharacterSet*)separators {
  NSMutableArray* parts = [NSMutableArray array];
  std::string part;
  for (const char c : [self softmetal_utf8]) {
    if ([separators characterIsMember:static_cast<unsigned char>(c)]) {
      [parts addObject:to_nsstring(part)];
      part.clear();
    } else {
      part += c;
    }
  }
  [parts addObject:to_nsstring(part)];
  return parts;
}
- (NSString*)stringByTrimmingCharactersInSet:(NSCharacterSet*)set {
  std::string_view text = [self softmetal_utf8];
  while (!text.empty() && [set characterIsMember:static_cast<unsigned char>(text.front())])
    text.remove_prefix(1);
  while (!text.empty() && [set characterIsMember:static_cast<unsigned char>(text.back())])
    text.remove_suffix(1);
  return to_nsstring(text);
}
- (NSString*)stringByReplacingOccurrencesOfString:(NSString*)target
                                       withString:(NSString*)replacement {
  NSUInteger count;
  return to_nsstring(
      replace_all(to_string(self), [target softmetal_utf8], [replacement softmetal_utf8], &count));
}
- (NSString*)lowercaseString {
  std::string text = to_string(self);
  for (char& c : text) c = static_cast<char>(c & 0x80 ? c : tolower(c));
  return to_nsstring(text);
}
- (NSString*)uppercaseString {
  std::string text = to_string(self);
  for (char& c : text) c = static_cast<char>(c & 0x80 ? c : toupper(c));
  return to_nsstring(text);
}
- (int)intValue {
  return static_cast<int>(self.longLongValue);
}
- (NSInteger)integerValue {
  return self.longLongValue;
}
- (long long)longLongValue {
  return strtoll(to_string(self).c_str(), nullptr, 10);
}
- (float)floatValue {
  return strtof(to_string(self).c_str(), nullptr);
}
- (double)doubleValue {
  return strtod(to_string(self).c_str(), nullptr);
}
- (BOOL)boolValue {
  const std::string text = to_string(self);
  const size_t first = text.find_first_not_of(" \t+-0");
  return first != std::string::npos && strchr("YyTt123456789", text[first]);
}
- (NSString*)description {
  return self;
}
- (BOOL)writeToFile:(NSString*)path
         atomically:(BOOL)atomically
           encoding:(NSStringEncoding)encoding
              error:(NSError**)error {
  if ([[self dataUsingEncoding:encoding] writeToFile:path atomically:atomically]) return YES;
  softmetal::set_error(error, NSCocoaErrorDomain, NSFileWriteUnknownError,
                       "The file " + to_string(path) + " could not be written: " + strerror(errno));
  return NO;
}

@end

@implementation SoftmetalString

- (std::string_view)softmetal_utf8 {
  return _text;
}
- (const char*)UTF8String {
  return _text.c_str();
}
- (instancetype)initWithBytes:(const void*)bytes
                       length:(NSUInteger)length
                     encoding:(NSStringEncoding)encoding {
  if (!is_supported(encoding)) return nil;
  _text.assign(static_cast<const char*>(bytes), length);
  return self;
}

@end

@implementation NSMutableString {
  std::string _text;
}

+ (instancetype)stringWithCapacity:(NSUInteger)capacity {
  return [[self alloc] initWithCapacity:capacity];
}
- (instancetype)initWithCapacity:(NSUInteger)capacity {
  self = [super init];
  _text.reserve(capacity);
  return self;
}
- (std::string_view)softmetal_utf8 {
  return _text;
}
- (const char*)UTF8String {
  return _text.c_str();
}
- (instancetype)initWithBytes:(const void*)bytes
                       length:(NSUInteger)length
                     encoding:(NSStringEncoding)encoding {
  if (!is_supported(encoding)) return nil;
  _text.assign(static_cast<const char*>(bytes), length);
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  return to_nsstring(_text);
}
- (NSString*)description {
  return to_nsstring(_text);
}
- (void)appendString:(NSString*)string {
  _text += to_string(string);
}
- (void)appendFormat:(NSString*)format, ... {
  va_list arguments;
  va_start(arguments, format);
  _text += softmetal::format(format, arguments);
  va_end(arguments);
}
- (void)setString:(NSString*)string {
  _text = to_string(string);
}
- (void)insertString:(NSString*)string atIndex:(NSUInteger)index {
  [self replaceCharactersInRange:NSMakeRange(index, 0) withString:string];
}
- (void)deleteCharactersInRange:(NSRange)range {
  [self replaceCharactersInRange:range withString:@""];
}
- (void)replaceCharactersInRange:(NSRange)range withString:(NSString*)string {
  const size_t length = softmetal::utf16_length(_text);
  if (NSMaxRange(range) > length)
    softmetal::raise_range("-[NSMutableString replaceCharactersInRange:withString:]",
                           NSMaxRange(range), length);
  const size_t from = byte_offset(_text, range.location);
  _text.replace(from, byte_offset(_text, NSMaxRange(range)) - from, to_string(string));
}
- (NSUInteger)replaceOccurrencesOfString:(NSString*)target
                              withString:(NSString*)replacement
                                 options:(NSStringCompareOptions)options
                                   range:(NSRange)range {
  NSUInteger count;
  const size_t from = byte_offset(_text, range.location);
  const size_t to = byte_offset(_text, NSMaxRange(range));
  _text.replace(from, to - from,
                replace_all(_text.substr(from, to - from), [target softmetal_utf8],
                            [replacement softmetal_utf8], &count));
  return count;
}

@end

namespace softmetal {

NSString* to_nsstring(std::string_view text) {
  return [[NSString alloc] initWithBytes:text.data()
                                  length:text.size()
                                encoding:NSUTF8StringEncoding];
}

}  // namespace softmetal
