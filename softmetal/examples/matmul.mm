// C = A B on the GPU, compared with a product in double precision.
// Usage: matmul [path of matmul.metal]; without one, the default library is used.
#include "support.h"

#include <cmath>
#include <random>
#include <vector>

struct Shape {
  uint32_t m, n, k;
};

static id<MTLBuffer> random_matrix(id<MTLDevice> device, std::mt19937& random, size_t count) {
  std::normal_distribution<float> normal;
  id<MTLBuffer> matrix = [device newBufferWithLength:count * sizeof(float)
                                             options:MTLResourceStorageModeShared];
  float* values = static_cast<float*>(matrix.contents);
  for (size_t i = 0; i < count; ++i) values[i] = normal(random);
  return matrix;
}

int main(int argc, const char** argv) {
  @autoreleasepool {
    id<MTLDevice> device = default_device();
    id<MTLComputePipelineState> pipeline =
        make_pipeline(device, argc > 1 ? argv[1] : nullptr, @"matmul");

    const Shape shape = {100, 70, 45};
    std::mt19937 random(0);
    id<MTLBuffer> a = random_matrix(device, random, shape.m * shape.k);
    id<MTLBuffer> b = random_matrix(device, random, shape.k * shape.n);
    id<MTLBuffer> c = [device newBufferWithLength:shape.m * shape.n * sizeof(float)
                                          options:MTLResourceStorageModeShared];

    id<MTLCommandBuffer> commands = [[device newCommandQueue] commandBuffer];
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
    [encoder setComputePipelineState:pipeline];
    [encoder setBuffer:a offset:0 atIndex:0];
    [encoder setBuffer:b offset:0 atIndex:1];
    [encoder setBuffer:c offset:0 atIndex:2];
    [encoder setBytes:&shape length:sizeof shape atIndex:3];
    const NSUInteger tile = 32;
    [encoder dispatchThreadgroups:MTLSizeMake((shape.n + tile - 1) / tile,
                                              (shape.m + tile - 1) / tile, 1)
            threadsPerThreadgroup:MTLSizeMake(128, 1, 1)];
    [encoder endEncoding];
    run(commands);

    const float* as = static_cast<const float*>(a.contents);
    const float* bs = static_cast<const float*>(b.contents);
    const float* cs = static_cast<const float*>(c.contents);
    double worst = 0;
    for (uint32_t i = 0; i < shape.m; ++i) {
      for (uint32_t j = 0; j < shape.n; ++j) {
        double sum = 0;
        for (uint32_t k = 0; k < shape.k; ++k) {
          sum += static_cast<double>(as[i * shape.k + k]) * bs[k * shape.n + j];
        }
        worst = std::fmax(worst, std::fabs(sum - cs[i * shape.n + j]));
      }
    }
    if (!(worst < 1e-4)) {
      fprintf(stderr, "the largest error is %g\n", worst);
      return 1;
    }
    printf("%s: %u x %u x %u, largest error %.1e, all right\n", device.name.UTF8String, shape.m,
           shape.n, shape.k, worst);
  }
  return 0;
}
