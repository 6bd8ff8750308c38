#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "softmetal/foundation/internal.h"

@interface NSData () {
 @public
  unsigned char* _bytes;
  NSUInteger _length;
  void (^_deallocator)(void*, NSUInteger);
}
@end

namespace {

void check_range(NSRange range, NSUInteger length, const char* method) {
  if (NSMaxRange(range) > length) softmetal::raise_range(method, NSMaxRange(range), length);
}

}  // namespace

@implementation NSData

+ (instancetype)data {
  return [[self alloc] init];
}
+ (instancetype)dataWithBytes:(const void*)bytes length:(NSUInteger)length {
  return [[self alloc] initWithBytes:bytes length:length];
}
+ (instancetype)dataWithBytesNoCopy:(void*)bytes length:(NSUInteger)length {
  return [[self alloc] initWithBytesNoCopy:bytes length:length freeWhenDone:YES];
}
+ (instancetype)dataWithBytesNoCopy:(void*)bytes
                             length:(NSUInteger)length
                       freeWhenDone:(BOOL)freeWhenDone {
  return [[self alloc] initWithBytesNoCopy:bytes length:length freeWhenDone:freeWhenDone];
}
+ (instancetype)dataWithData:(NSData*)data {
  return [[self alloc] initWithData:data];
}
+ (instancetype)dataWithContentsOfFile:(NSString*)path {
  return [self dataWithContentsOfFile:path options:0 error:nil];
}
+ (instancetype)dataWithContentsOfURL:(NSURL*)url {
  return [self dataWithContentsOfFile:url.path];
}
+ (instancetype)dataWithContentsOfFile:(NSString*)path
                               options:(NSDataReadingOptions)options
                                 error:(NSError**)error {
  errno = 0;
  std::ifstream file(softmetal::to_string(path), std::ios::binary);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  if (!file) {
    softmetal::set_error(error, NSCocoaErrorDomain,
                         errno == ENOENT ? NSFileReadNoSuchFileError : NSFileReadUnknownError,
                         "The file “" + softmetal::to_string(path) +
                             "” couldn’t be opened: " + strerror(errno ? errno : EIO) + ".");
    return nil;
  }
  const std::string contents = std::move(text).str();
  return [[self alloc] initWithBytes:contents.data() length:contents.size()];
}

- (instancetype)initWithBytes:(const void*)bytes length:(NSUInteger)length {
  self = [super init];
  _bytes = static_cast<unsigned char*>(malloc(std::max<NSUInteger>(length, 1)));
  _length = length;
  if (length) memcpy(_bytes, bytes, length);
  return self;
}
- (instancetype)initWithBytesNoCopy:(void*)bytes length:(NSUInteger)length {
  return [self initWithBytesNoCopy:bytes length:length freeWhenDone:YES];
}
- (instancetype)initWithBytesNoCopy:(void*)bytes
                             length:(NSUInteger)length
                       freeWhenDone:(BOOL)freeWhenDone {
  return [self initWithBytesNoCopy:bytes
                            length:length
                       deallocator:^(void* memory, NSUInteger) {
                         if (freeWhenDone) free(memory);
                       }];
}
- (instancetype)initWithBytesNoCopy:(void*)bytes
                             length:(NSUInteger)length
                        deallocator:(void (^)(void*, NSUInteger))deallocator {
  self = [super init];
  _bytes = static_cast<unsigned char*>(bytes);
  _length = length;
  _deallocator = deallocator ? deallocator : ^(void*, NSUInteger) {
  };
  return self;
}
- (instancetype)initWithData:(NSData*)data {
  return [self initWithBytes:data.bytes length:data.length];
}
- (instancetype)initWithContentsOfFile:(NSString*)path {
  return [[self class] dataWithContentsOfFile:path];
}
- (instancetype)initWithContentsOfURL:(NSURL*)url {
  return [[self class] dataWithContentsOfFile:url.path];
}
- (void)dealloc {
  if (_deallocator)
    _deallocator(_bytes, _length);
  else
    free(_bytes);
}

- (NSUInteger)length {
  return _length;
}
- (const void*)bytes {
  return _bytes;
}
- (void)getBytes:(void*)buffer length:(NSUInteger)length {
  if (const NSUInteger count = std::min(length, _length)) memcpy(buffer, _bytes, count);
}
- (void)getBytes:(void*)buffer range:(NSRange)range {
  check_range(range, _length, "-[NSData getBytes:range:]");
  if (range.length) memcpy(buffer, _bytes + range.location, range.length);
}
- (NSData*)subdataWithRange:(NSRange)range {
  check_range(range, _length, "-[NSData subdataWithRange:]");
  return [NSData dataWithBytes:_bytes + range.location length:range.length];
}
- (BOOL)isEqualToData:(NSData*)other {
  return other && _length == other->_length &&
         (!_length || memcmp(_bytes, other->_bytes, _length) == 0);
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSData class]] && [self isEqualToData:object];
}
- (NSUInteger)hash {
  return std::hash<std::string_view>()({reinterpret_cast<const char*>(_bytes), _length});
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (id)mutableCopyWithZone:(NSZone*)zone {
  return [[NSMutableData alloc] initWithBytes:_bytes length:_length];
}
- (BOOL)writeToFile:(NSString*)path atomically:(BOOL)atomically {
  const std::string target = softmetal::to_string(path);
  const std::string written = atomically ? target + ".partial" : target;
  std::ofstream file(written, std::ios::binary);
  file.write(reinterpret_cast<const char*>(_bytes), static_cast<std::streamsize>(_length));
  file.close();
  return file && (!atomically || rename(written.c_str(), target.c_str()) == 0);
}
- (BOOL)writeToURL:(NSURL*)url atomically:(BOOL)atomically {
  return [self writeToFile:url.path atomically:atomically];
}
- (NSString*)description {
  return [NSString stringWithFormat:@"{length = %lu}", _length];
}

@end

@implementation NSMutableData {
  NSUInteger _capacity;
}

@dynamic length;

+ (instancetype)dataWithCapacity:(NSUInteger)capacity {
  return [[self alloc] initWithCapacity:capacity];
}
+ (instancetype)dataWithLength:(NSUInteger)length {
  return [[self alloc] initWithLength:length];
}
- (instancetype)initWithCapacity:(NSUInteger)capacity {
  return [self initWithBytes:nullptr length:0];
}
- (instancetype)initWithLength:(NSUInteger)length {
  self = [self initWithBytes:nullptr length:0];
  self.length = length;
  return self;
}
- (instancetype)initWithBytesNoCopy:(void*)bytes
                             length:(NSUInteger)length
                        deallocator:(void (^)(void*, NSUInteger))deallocator {
  self = [self initWithBytes:bytes length:length];
  if (deallocator) deallocator(bytes, length);
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  return [[NSData alloc] initWithBytes:_bytes length:_length];
}
- (void*)mutableBytes {
  return _bytes;
}
- (void)setLength:(NSUInteger)length {
  if (length > std::max(_capacity, _length)) {
    _capacity = std::max(length, _capacity * 2);
    _bytes = static_cast<unsigned char*>(realloc(_bytes, _capacity));
  }
  if (length > _length) memset(_bytes + _length, 0, length - _length);
  _length = length;
}
- (void)appendBytes:(const void*)bytes length:(NSUInteger)length {
  const NSUInteger end = _length;
  self.length = end + length;
  if (length) memcpy(_bytes + end, bytes, length);
}
- (void)appendData:(NSData*)data {
  [self appendBytes:data.bytes length:data.length];
}
- (void)increaseLengthBy:(NSUInteger)extra {
  self.length = _length + extra;
}
- (void)replaceBytesInRange:(NSRange)range withBytes:(const void*)bytes {
  if (NSMaxRange(range) > _length) self.length = NSMaxRange(range);
  if (range.length) memcpy(_bytes + range.location, bytes, range.length);
}
- (void)resetBytesInRange:(NSRange)range {
  if (NSMaxRange(range) > _length) self.length = NSMaxRange(range);
  memset(_bytes + range.location, 0, range.length);
}

@end
