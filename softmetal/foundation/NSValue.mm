// Boxed values and numbers.
#include <cmath>
#include <cstring>
#include <vector>

#include "softmetal/foundation/internal.h"

namespace {

size_t size_of_type(const char* type) {
  switch (*type) {
    case 'c':
    case 'C':
    case 'B':
      return 1;
    case 's':
    case 'S':
      return 2;
    case 'i':
    case 'I':
    case 'f':
      return 4;
    case 'l':
    case 'L':
    case 'q':
    case 'Q':
    case 'd':
    case '^':
    case '@':
    case '#':
    case ':':
    case '*':
      return 8;
    case '{': {
      // The members follow the '='; padding as in C.
      size_t size = 0, alignment = 1;
      const char* member = strchr(type, '=');
      if (!member) return 0;
      for (++member; *member && *member != '}';) {
        const size_t member_size = size_of_type(member);
        const size_t member_alignment = std::min<size_t>(member_size ? member_size : 1, 8);
        size = (size + member_alignment - 1) / member_alignment * member_alignment + member_size;
        alignment = std::max(alignment, member_alignment);
        if (*member == '^') ++member;
        if (*member == '{') {
          int depth = 0;
          do {
            depth += *member == '{' ? 1 : *member == '}' ? -1 : 0;
            ++member;
          } while (depth && *member);
        } else {
          ++member;
        }
      }
      return (size + alignment - 1) / alignment * alignment;
    }
    default:
      return 0;
  }
}

}  // namespace

@interface SoftmetalValue : NSValue {
  std::string _type;
  std::vector<unsigned char> _bytes;
}
@end

@implementation NSValue

+ (instancetype)allocWithZone:(NSZone*)zone {
  if (self == [NSValue class]) return (id)[SoftmetalValue allocWithZone:zone];
  return [super allocWithZone:zone];
}
- (instancetype)initWithBytes:(const void*)bytes objCType:(const char*)type {
  [self doesNotRecognizeSelector:_cmd];
  return nil;
}
+ (NSValue*)valueWithBytes:(const void*)bytes objCType:(const char*)type {
  return [[NSValue alloc] initWithBytes:bytes objCType:type];
}
+ (NSValue*)value:(const void*)bytes withObjCType:(const char*)type {
  return [[NSValue alloc] initWithBytes:bytes objCType:type];
}
+ (NSValue*)valueWithPointer:(const void*)pointer {
  return [self valueWithBytes:&pointer objCType:"^v"];
}
+ (NSValue*)valueWithNonretainedObject:(id)object {
  const void* pointer = (__bridge const void*)object;
  return [self valueWithBytes:&pointer objCType:"@"];
}
+ (NSValue*)valueWithRange:(NSRange)range {
  return [self valueWithBytes:&range objCType:"{_NSRange=QQ}"];
}
- (const char*)objCType {
  [self doesNotRecognizeSelector:_cmd];
  return nullptr;
}
- (void)getValue:(void*)value size:(NSUInteger)size {
  [self doesNotRecognizeSelector:_cmd];
}
- (void)getValue:(void*)value {
  [self getValue:value size:size_of_type(self.objCType)];
}
- (void*)pointerValue {
  void* pointer = nullptr;
  [self getValue:&pointer size:sizeof pointer];
  return pointer;
}
- (id)nonretainedObjectValue {
  return (__bridge id)self.pointerValue;
}
- (NSRange)rangeValue {
  NSRange range = {0, 0};
  [self getValue:&range size:sizeof range];
  return range;
}
- (BOOL)isEqualToValue:(NSValue*)other {
  return [self isEqual:other];
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}

@end

@implementation SoftmetalValue

- (instancetype)initWithBytes:(const void*)bytes objCType:(const char*)type {
  _type = type;
  const auto* first = static_cast<const unsigned char*>(bytes);
  _bytes.assign(first, first + size_of_type(type));
  return self;
}
- (const char*)objCType {
  return _type.c_str();
}
- (void)getValue:(void*)value size:(NSUInteger)size {
  memcpy(value, _bytes.data(), std::min<size_t>(size, _bytes.size()));
}
- (BOOL)isEqual:(id)object {
  if (![object isKindOfClass:[SoftmetalValue class]]) return NO;
  const SoftmetalValue* other = object;
  return _type == other->_type && _bytes == other->_bytes;
}
- (NSUInteger)hash {
  return std::hash<std::string_view>()(
      {reinterpret_cast<const char*>(_bytes.data()), _bytes.size()});
}

@end

@implementation NSNumber {
  char _type[2];
  union {
    long long integer;
    unsigned long long natural;
    double real;
  } _value;
}

- (BOOL)isReal {
  return _type[0] == 'f' || _type[0] == 'd';
}
- (BOOL)isUnsigned {
  return strchr("CSILQ", _type[0]) != nullptr;
}

- (instancetype)initSigned:(long long)value type:(char)type {
  self = [super init];
  _type[0] = type;
  _value.integer = value;
  return self;
}
- (instancetype)initUnsigned:(unsigned long long)value type:(char)type {
  self = [super init];
  _type[0] = type;
  _value.natural = value;
  return self;
}
- (instancetype)initReal:(double)value type:(char)type {
  self = [super init];
  _type[0] = type;
  _value.real = value;
  return self;
}

- (instancetype)initWithInt:(int)value {
  return [self initSigned:value type:'i'];
}
- (instancetype)initWithUnsignedInt:(unsigned int)value {
  return [self initUnsigned:value type:'I'];
}
- (instancetype)initWithLongLong:(long long)value {
  return [self initSigned:value type:'q'];
}
- (instancetype)initWithUnsignedLongLong:(unsigned long long)value {
  return [self initUnsigned:value type:'Q'];
}
- (instancetype)initWithFloat:(float)value {
  return [self initReal:value type:'f'];
}
- (instancetype)initWithDouble:(double)value {
  return [self initReal:value type:'d'];
}
- (instancetype)initWithBool:(BOOL)value {
  return [self initSigned:value type:'B'];
}
- (instancetype)initWithInteger:(NSInteger)value {
  return [self initSigned:value type:'q'];
}
- (instancetype)initWithUnsignedInteger:(NSUInteger)value {
  return [self initUnsigned:value type:'Q'];
}
+ (NSNumber*)numberWithChar:(char)value {
  return [[self alloc] initSigned:value type:'c'];
}
+ (NSNumber*)numberWithUnsignedChar:(unsigned char)value {
  return [[self alloc] initUnsigned:value type:'C'];
}
+ (NSNumber*)numberWithShort:(short)value {
  return [[self alloc] initSigned:value type:'s'];
}
+ (NSNumber*)numberWithUnsignedShort:(unsigned short)value {
  return [[self alloc] initUnsigned:value type:'S'];
}
+ (NSNumber*)numberWithInt:(int)value {
  return [[self alloc] initWithInt:value];
}
+ (NSNumber*)numberWithUnsignedInt:(unsigned int)value {
  return [[self alloc] initWithUnsignedInt:value];
}
+ (NSNumber*)numberWithLong:(long)value {
  return [[self alloc] initSigned:value type:'l'];
}
+ (NSNumber*)numberWithUnsignedLong:(unsigned long)value {
  return [[self alloc] initUnsigned:value type:'L'];
}
+ (NSNumber*)numberWithLongLong:(long long)value {
  return [[self alloc] initWithLongLong:value];
}
+ (NSNumber*)numberWithUnsignedLongLong:(unsigned long long)value {
  return [[self alloc] initWithUnsignedLongLong:value];
}
+ (NSNumber*)numberWithFloat:(float)value {
  return [[self alloc] initWithFloat:value];
}
+ (NSNumber*)numberWithDouble:(double)value {
  return [[self alloc] initWithDouble:value];
}
+ (NSNumber*)numberWithBool:(BOOL)value {
  return [[self alloc] initWithBool:value];
}
+ (NSNumber*)numberWithInteger:(NSInteger)value {
  return [[self alloc] initWithInteger:value];
}
+ (NSNumber*)numberWithUnsignedInteger:(NSUInteger)value {
  return [[self alloc] initWithUnsignedInteger:value];
}

- (long long)longLongValue {
  return self.isReal ? static_cast<long long>(_value.real) : _value.integer;
}
- (unsigned long long)unsignedLongLongValue {
  return self.isReal ? static_cast<unsigned long long>(_value.real) : _value.natural;
}
- (double)doubleValue {
  if (self.isReal) return _value.real;
  return self.isUnsigned ? static_cast<double>(_value.natural)
                         : static_cast<double>(_value.integer);
}
- (float)floatValue {
  return static_cast<float>(self.doubleValue);
}
- (BOOL)boolValue {
  return self.isReal ? _value.real != 0 : _value.integer != 0;
}
- (char)charValue {
  return static_cast<char>(self.longLongValue);
}
- (unsigned char)unsignedCharValue {
  return static_cast<unsigned char>(self.longLongValue);
}
- (short)shortValue {
  return static_cast<short>(self.longLongValue);
}
- (unsigned short)unsignedShortValue {
  return static_cast<unsigned short>(self.longLongValue);
}
- (int)intValue {
  return static_cast<int>(self.longLongValue);
}
- (unsigned int)unsignedIntValue {
  return static_cast<unsigned int>(self.longLongValue);
}
- (long)longValue {
  return self.longLongValue;
}
- (unsigned long)unsignedLongValue {
  return self.unsignedLongLongValue;
}
- (NSInteger)integerValue {
  return self.longLongValue;
}
- (NSUInteger)unsignedIntegerValue {
  return self.unsignedLongLongValue;
}
- (const char*)objCType {
  return _type;
}
- (void)getValue:(void*)value size:(NSUInteger)size {
  if (_type[0] == 'f') {
    const float real = static_cast<float>(_value.real);
    memcpy(value, &real, std::min<size_t>(size, sizeof real));
  } else {
    memcpy(value, &_value.natural, std::min<size_t>(size, sizeof _value.natural));
  }
}

- (NSString*)stringValue {
  char text[40];
  if (_type[0] == 'f')
    snprintf(text, sizeof text, "%.7g", _value.real);
  else if (_type[0] == 'd')
    snprintf(text, sizeof text, "%.16g", _value.real);
  else if (self.isUnsigned)
    snprintf(text, sizeof text, "%llu", _value.natural);
  else
    snprintf(text, sizeof text, "%lld", _value.integer);
  return softmetal::to_nsstring(text);
}
- (NSString*)description {
  return self.stringValue;
}
- (NSComparisonResult)compare:(NSNumber*)other {
  if (!self.isReal && !other.isReal && !self.isUnsigned && !other.isUnsigned) {
    return _value.integer < other->_value.integer   ? NSOrderedAscending
           : _value.integer > other->_value.integer ? NSOrderedDescending
                                                    : NSOrderedSame;
  }
  const double mine = self.doubleValue, its = other.doubleValue;
  return mine < its ? NSOrderedAscending : mine > its ? NSOrderedDescending : NSOrderedSame;
}
- (BOOL)isEqualToNumber:(NSNumber*)other {
  return other && [self compare:other] == NSOrderedSame;
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSNumber class]] && [self isEqualToNumber:object];
}
- (NSUInteger)hash {
  return std::hash<double>()(self.doubleValue);
}

@end

@implementation NSNull

+ (NSNull*)null {
  static NSNull* instance = [[NSNull alloc] init];
  return instance;
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (NSString*)description {
  return @"<null>";
}

@end
