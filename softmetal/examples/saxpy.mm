// y = a x + y on the GPU.
// Usage: saxpy [path of saxpy.metal]; without one, the default library is used.
#include "support.h"

int main(int argc, const char** argv) {
  @autoreleasepool {
    id<MTLDevice> device = default_device();
    id<MTLComputePipelineState> pipeline =
        make_pipeline(device, argc > 1 ? argv[1] : nullptr, @"saxpy");

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
    run(commands);

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
