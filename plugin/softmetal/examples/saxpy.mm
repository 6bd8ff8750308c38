// y = a x + y on the GPU. Usage: saxpy [path of saxpy.metal]
#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <cstdio>
#include <cstdlib>

static id<MTLComputePipelineState> make_pipeline(id<MTLDevice> device, NSString* path,
                                                 NSString* name) {
  NSError* error = nil;
  NSString* source = [NSString stringWithContentsOfFile:path
                                               encoding:NSUTF8StringEncoding
                                                  error:&error];
  id<MTLLibrary> library =
      source ? [device newLibraryWithSource:source options:nil error:&error] : nil;
  id<MTLFunction> function = [library newFunctionWithName:name];
  id<MTLComputePipelineState> pipeline =
      function ? [device newComputePipelineStateWithFunction:function error:&error] : nil;
  if (!pipeline) {
    fprintf(stderr, "%s: %s\n", path.UTF8String,
            error ? error.localizedDescription.UTF8String : "no such function");
    exit(1);
  }
  return pipeline;
}

int main(int argc, const char** argv) {
  @autoreleasepool {
    id<MTLDevice> device = MTLCreateSystemDefaultDevice();
    if (!device) {
      fprintf(stderr, "no Metal device\n");
      return 1;
    }
    NSString* path = argc > 1 ? @(argv[1]) : @"saxpy.metal";
    id<MTLComputePipelineState> pipeline = make_pipeline(device, path, @"saxpy");

    const NSUInteger count = 1000003;
    const float a = 2.5f;
    id<MTLBuffer> x = [device newBufferWithLength:count * sizeof(float)
                                          options:MTLResourceStorageModeShared];
    id<MTLBuffer> y = [device newBufferWithLength:count * sizeof(float)
                                          options:MTLResourceStorageModeShared];
    float* xs = static_cast<float*>(x.contents);
    float* ys = static_cast<float*>(y.contents);
    for (NSUInteger i = 0; i < count; ++i) {
      xs[i] = static_cast<float>(i % 1000);
      ys[i] = static_cast<float>(i % 77);
    }

    id<MTLCommandBuffer> commands = [[device newCommandQueue] commandBuffer];
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
    [encoder setComputePipelineState:pipeline];
    [encoder setBuffer:x offset:0 atIndex:0];
    [encoder setBuffer:y offset:0 atIndex:1];
    [encoder setBytes:&a length:sizeof a atIndex:2];
    [encoder dispatchThreads:MTLSizeMake(count, 1, 1)
        threadsPerThreadgroup:MTLSizeMake(pipeline.maxTotalThreadsPerThreadgroup, 1, 1)];
    [encoder endEncoding];
    [commands commit];
    [commands waitUntilCompleted];
    if (commands.status != MTLCommandBufferStatusCompleted) {
      fprintf(stderr, "%s\n", commands.error.localizedDescription.UTF8String);
      return 1;
    }

    for (NSUInteger i = 0; i < count; ++i) {
      const float expected = a * static_cast<float>(i % 1000) + static_cast<float>(i % 77);
      if (ys[i] != expected) {
        fprintf(stderr, "y[%lu] is %g, not %g\n", static_cast<unsigned long>(i),
                static_cast<double>(ys[i]), static_cast<double>(expected));
        return 1;
      }
    }
    printf("%s: %lu elements, all right\n", device.name.UTF8String,
           static_cast<unsigned long>(count));
  }
  return 0;
}
