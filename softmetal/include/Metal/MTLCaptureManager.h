#pragma once

#import <Metal/MTLDefines.h>

NS_ASSUME_NONNULL_BEGIN

@protocol MTLCommandQueue
, MTLDevice;

FOUNDATION_EXPORT NSErrorDomain const MTLCaptureErrorDomain;

typedef NS_ENUM(NSInteger, MTLCaptureError) {
  MTLCaptureErrorNotSupported = 1,
  MTLCaptureErrorAlreadyCapturing = 2,
  MTLCaptureErrorInvalidDescriptor = 3,
};

typedef NS_ENUM(NSInteger, MTLCaptureDestination) {
  MTLCaptureDestinationDeveloperTools = 1,
  MTLCaptureDestinationGPUTraceDocument = 2,
};

@protocol MTLCaptureScope <NSObject>
@property(nullable, copy, atomic) NSString* label;
@property(nonnull, readonly, nonatomic) id<MTLDevice> device;
@property(nullable, readonly, nonatomic) id<MTLCommandQueue> commandQueue;
- (void)beginScope;
- (void)endScope;
@end

MTL_EXPORT
@interface MTLCaptureDescriptor : NSObject <NSCopying>
@property(nullable, nonatomic, strong) id captureObject;
@property(nonatomic) MTLCaptureDestination destination;
@property(nullable, nonatomic, copy) NSURL* outputURL;
@end

// There is no debugger to capture for: no destination is supported, and a capture never starts.
MTL_EXPORT
@interface MTLCaptureManager : NSObject
@property(nullable, readwrite, strong, atomic) id<MTLCaptureScope> defaultCaptureScope;
@property(readonly) BOOL isCapturing;
+ (MTLCaptureManager*)sharedCaptureManager;
- (id<MTLCaptureScope>)newCaptureScopeWithDevice:(id<MTLDevice>)device;
- (id<MTLCaptureScope>)newCaptureScopeWithCommandQueue:(id<MTLCommandQueue>)commandQueue;
- (BOOL)supportsDestination:(MTLCaptureDestination)destination;
- (BOOL)startCaptureWithDescriptor:(MTLCaptureDescriptor*)descriptor
                             error:(NSError* _Nullable*)error;
- (void)stopCapture;
@end

NS_ASSUME_NONNULL_END
