#pragma once

#import <Metal/MTLDefines.h>

@protocol MTLAllocation <NSObject>
@property(readonly) NSUInteger allocatedSize;
@end
