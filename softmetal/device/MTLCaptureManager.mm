#include "softmetal/device/device.h"

NSErrorDomain const MTLCaptureErrorDomain = @"MTLCaptureErrorDomain";

@interface SoftmetalCaptureScope : NSObject <MTLCaptureScope>
- (instancetype)initWithDevice:(id<MTLDevice>)device queue:(nullable id<MTLCommandQueue>)queue;
@end

@implementation SoftmetalCaptureScope {
  id<MTLDevice> _device;
  id<MTLCommandQueue> _queue;
}
@synthesize label = _label;

- (instancetype)initWithDevice:(id<MTLDevice>)device queue:(id<MTLCommandQueue>)queue {
  self = [super init];
  _device = device;
  _queue = queue;
  return self;
}
- (id<MTLDevice>)device {
  return _device;
}
- (id<MTLCommandQueue>)commandQueue {
  return _queue;
}
- (void)beginScope {
}
- (void)endScope {
}

@end

@implementation MTLCaptureDescriptor

- (id)copyWithZone:(NSZone*)zone {
  MTLCaptureDescriptor* copy = [[MTLCaptureDescriptor alloc] init];
  copy.captureObject = _captureObject;
  copy.destination = _destination;
  copy.outputURL = _outputURL;
  return copy;
}

@end

@implementation MTLCaptureManager

+ (MTLCaptureManager*)sharedCaptureManager {
  static MTLCaptureManager* manager = [[MTLCaptureManager alloc] init];
  return manager;
}
- (BOOL)isCapturing {
  return NO;
}
- (id<MTLCaptureScope>)newCaptureScopeWithDevice:(id<MTLDevice>)device {
  return [[SoftmetalCaptureScope alloc] initWithDevice:device queue:nil];
}
- (id<MTLCaptureScope>)newCaptureScopeWithCommandQueue:(id<MTLCommandQueue>)queue {
  return [[SoftmetalCaptureScope alloc] initWithDevice:queue.device queue:queue];
}
- (BOOL)supportsDestination:(MTLCaptureDestination)destination {
  return NO;
}
- (BOOL)startCaptureWithDescriptor:(MTLCaptureDescriptor*)descriptor error:(NSError**)error {
  softmetal::set_error(error, MTLCaptureErrorDomain, MTLCaptureErrorNotSupported,
                       "Capturing is not supported by this device");
  return NO;
}
- (void)stopCapture {
}

@end
