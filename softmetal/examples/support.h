// What both examples need: a device, a pipeline, and a command buffer run to its end.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <cstdio>
#include <cstdlib>

[[noreturn]] inline void fail(NSString* what, NSError* error) {
  fprintf(stderr, "%s: %s\n", what.UTF8String,
          error ? error.localizedDescription.UTF8String : "not found");
  exit(1);
}

inline id<MTLDevice> default_device() {
  id<MTLDevice> device = MTLCreateSystemDefaultDevice();
  if (!device) fail(@"Metal device", nil);
  return device;
}

// From the Metal text at `path`, or from the default library where there is none.
inline id<MTLComputePipelineState> make_pipeline(id<MTLDevice> device, const char* path,
                                                 NSString* name) {
  NSError* error = nil;
  id<MTLLibrary> library = nil;
  if (path) {
    NSString* source = [NSString stringWithContentsOfFile:@(path)
                                                 encoding:NSUTF8StringEncoding
                                                    error:&error];
    if (source) library = [device newLibraryWithSource:source options:nil error:&error];
  } else {
    library = [device newDefaultLibrary];
  }
  if (!library) fail(path ? @(path) : @"default library", error);
  id<MTLFunction> function = [library newFunctionWithName:name];
  if (!function) fail(name, nil);
  id<MTLComputePipelineState> pipeline = [device newComputePipelineStateWithFunction:function
                                                                               error:&error];
  if (!pipeline) fail(name, error);
  return pipeline;
}

inline void run(id<MTLCommandBuffer> commands) {
  [commands commit];
  [commands waitUntilCompleted];
  if (commands.status != MTLCommandBufferStatusCompleted) fail(@"command buffer", commands.error);
}
