// Pipelines need no machine code of their own here: libraries hold it. An archive keeps the names
// of the pipelines that were added, so that hits, misses and damaged files are as on a GPU.
#include <sstream>

#include "softmetal/device/device.h"

using softmetal::set_error;
using softmetal::to_nsstring;
using softmetal::to_string;

NSErrorDomain const MTLBinaryArchiveDomain = @"MTLBinaryArchiveDomain";

namespace {
constexpr char kHeader[] = "softmetal binary archive 1";
}

@implementation MTLBinaryArchiveDescriptor

- (id)copyWithZone:(NSZone*)zone {
  MTLBinaryArchiveDescriptor* copy = [[MTLBinaryArchiveDescriptor alloc] init];
  copy.url = _url;
  return copy;
}

@end

@implementation SoftmetalBinaryArchive {
  SoftmetalDevice* _device;
  NSMutableSet<NSString*>* _keys;
}
@synthesize label = _label;

- (instancetype)initWithDevice:(SoftmetalDevice*)device
                    descriptor:(MTLBinaryArchiveDescriptor*)descriptor
                         error:(NSError**)error {
  self = [super init];
  _device = device;
  _keys = [NSMutableSet set];
  if (!descriptor.url) return self;
  NSData* data = [NSData dataWithContentsOfFile:descriptor.url.path];
  std::istringstream in(data ? std::string(static_cast<const char*>(data.bytes), data.length) : "");
  std::string line;
  if (!std::getline(in, line) || line != kHeader) {
    set_error(error, MTLBinaryArchiveDomain, MTLBinaryArchiveErrorInvalidFile,
              "Invalid archive file " + to_string(descriptor.url.path));
    return nil;
  }
  while (std::getline(in, line)) [_keys addObject:to_nsstring(line)];
  return self;
}
- (id<MTLDevice>)device {
  return _device;
}
- (BOOL)softmetal_contains:(NSString*)key {
  @synchronized(self) {
    return [_keys containsObject:key];
  }
}
- (BOOL)addComputePipelineFunctionsWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                            error:(NSError**)error {
  // A pipeline that cannot be made is not stored either.
  if (![SoftmetalComputePipelineState stateWithDevice:_device
                                           descriptor:descriptor
                                              options:MTLPipelineOptionNone
                                                error:error]) {
    return NO;
  }
  @synchronized(self) {
    [_keys addObject:static_cast<SoftmetalFunction*>(descriptor.computeFunction).softmetal_key];
  }
  return YES;
}
- (BOOL)serializeToURL:(NSURL*)url error:(NSError**)error {
  std::string text = std::string(kHeader) + "\n";
  @synchronized(self) {
    for (NSString* key in _keys) text += to_string(key) + "\n";
  }
  NSData* data = [NSData dataWithBytes:text.data() length:text.size()];
  if ([data writeToFile:url.path atomically:YES]) return YES;
  set_error(error, MTLBinaryArchiveDomain, MTLBinaryArchiveErrorInternalError,
            "cannot write " + to_string(url.path));
  return NO;
}

@end
