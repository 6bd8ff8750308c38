#pragma once

#import <Metal/MTLDefines.h>

@protocol MTLDevice;

@protocol MTLFence <NSObject>
@property(nonnull, readonly) id<MTLDevice> device;
@property(nullable, copy, atomic) NSString* label;
@end
