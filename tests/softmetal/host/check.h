// The small harness of the host programs: TEST(name) { ... CHECK(...) ... }, one process per test.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

#define TEST(name)                                               \
  static void test_##name();                                     \
  static const Registration register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

inline void check_contains(const char* file, int line, NSString* text, const char* part) {
  if (text && std::strstr(text.UTF8String, part)) return;
  std::fprintf(stderr, "%s:%d: \"%s\" is not in \"%s\"\n", file, line, part,
               text ? text.UTF8String : "nil");
  std::exit(1);
}
#define CHECK_CONTAINS(text, part) check_contains(__FILE__, __LINE__, text, part)

inline int run_tests(int argc, const char** argv) {
  for (const Test& test : tests()) {
    if (argc > 1 && std::strcmp(argv[1], test.name) != 0) continue;
    @autoreleasepool {
      test.body();
    }
    std::printf("%s: ok\n", test.name);
    if (argc > 1) return 0;
  }
  if (argc > 1) std::fprintf(stderr, "no test %s\n", argv[1]);
  return argc > 1 ? 1 : 0;
}

// --- What most tests need ---

inline id<MTLDevice> device() {
  static id<MTLDevice> the_device = MTLCreateSystemDefaultDevice();
  return the_device;
}

inline id<MTLLibrary> library(NSString* source) {
  NSError* error = nil;
  id<MTLLibrary> made = [device() newLibraryWithSource:source options:nil error:&error];
  if (!made) std::fprintf(stderr, "%s\n", error.localizedDescription.UTF8String);
  CHECK(made && !error);
  return made;
}

inline id<MTLComputePipelineState> pipeline(id<MTLLibrary> from, NSString* name) {
  NSError* error = nil;
  id<MTLFunction> function = [from newFunctionWithName:name];
  CHECK(function);
  id<MTLComputePipelineState> made = [device() newComputePipelineStateWithFunction:function
                                                                             error:&error];
  if (!made) std::fprintf(stderr, "%s\n", error.localizedDescription.UTF8String);
  CHECK(made && !error);
  return made;
}

// Small kernels that tests share.
inline id<MTLComputePipelineState> pipeline(NSString* name) {
  static id<MTLLibrary> shared = library(@R"(
#include <metal_stdlib>
using namespace metal;
kernel void twice(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] *= 2; }
kernel void add(device float* x [[buffer(0)]], constant float& a [[buffer(1)]],
                uint i [[thread_position_in_grid]]) { x[i] += a; }
kernel void add_vectors(device float4* x [[buffer(0)]], device const float4* y [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) { x[i] += y[i]; }
kernel void sum(device float* out [[buffer(0)]], device const float* x [[buffer(1)]],
                threadgroup float* shared [[threadgroup(0)]],
                uint i [[thread_position_in_threadgroup]],
                uint n [[threads_per_threadgroup]]) {
  shared[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 0) {
    float total = 0;
    for (uint k = 0; k < n; ++k) total += shared[k];
    out[0] = total;
  }
}
kernel void not_all_reach(device float* x [[buffer(0)]],
                          uint i [[thread_position_in_threadgroup]]) {
  if (i < 7) threadgroup_barrier(mem_flags::mem_none);
  x[i] = 1;
}
kernel void forever(device atomic_uint* stop [[buffer(0)]]) {
  while (simd_max(atomic_load_explicit(stop, memory_order_relaxed)) == 0) {}
}
kernel void position(device uint* out [[buffer(0)]], uint i [[thread_position_in_grid]],
                     uint group [[threadgroup_position_in_grid]],
                     uint size [[threads_per_threadgroup]],
                     uint full [[dispatch_threads_per_threadgroup]]) {
  out[4 * i] = i; out[4 * i + 1] = group; out[4 * i + 2] = size; out[4 * i + 3] = full;
}
kernel void small [[max_total_threads_per_threadgroup(64)]](device float* x [[buffer(0)]]) {
  x[0] = 1;
}
kernel void static_memory(device float* out [[buffer(0)]], threadgroup float* more [[threadgroup(0)]],
                          uint i [[thread_position_in_threadgroup]]) {
  threadgroup float shared[5000];
  shared[i] = i;
  more[i] = i;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = shared[i] + more[i];
}
)");
  return pipeline(shared, name);
}

inline id<MTLBuffer> floats(std::vector<float> values) {
  return [device() newBufferWithBytes:values.data()
                               length:values.size() * sizeof(float)
                              options:MTLResourceStorageModeShared];
}

inline float* contents(id<MTLBuffer> buffer) { return static_cast<float*>(buffer.contents); }

// One dispatch of one threadgroup.
inline void encode(id<MTLCommandBuffer> commands, NSString* name, id<MTLBuffer> x,
                   NSUInteger threads) {
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:pipeline(name)];
  [encoder setBuffer:x offset:0 atIndex:0];
  [encoder dispatchThreadgroups:MTLSizeMake(1, 1, 1)
          threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
  [encoder endEncoding];
}
