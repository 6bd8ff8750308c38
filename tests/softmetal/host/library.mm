#include "check.h"

#include <unistd.h>

#include "softmetal/softmetal.h"

namespace {

NSString* const kConstants = @R"(
#include <metal_stdlib>
using namespace metal;
constant int scale [[function_constant(0)]];
constant bool negate [[function_constant(1)]];
constant float4 offsets [[function_constant(2)]];
constant bool has_scale = is_function_constant_defined(scale);
constant int factor = (has_scale ? scale : 1) * (negate ? -1 : 1);
kernel void k(device float* x [[buffer(0)]],
              device float* extra [[buffer(1), function_constant(negate)]],
              uint i [[thread_position_in_grid]]) {
  x[i] = x[i] * factor + offsets[i % 4];
  if (negate) extra[i] = 7;
}
)";

NSString* folder() {
  NSString* path = [NSTemporaryDirectory()
      stringByAppendingPathComponent:[NSString stringWithFormat:@"softmetal-%d", getpid()]];
  CHECK([[NSFileManager defaultManager] createDirectoryAtPath:path
                                  withIntermediateDirectories:YES
                                                   attributes:nil
                                                        error:nil]);
  return path;
}

id<MTLComputePipelineState> specialized(MTLFunctionConstantValues* values) {
  NSError* error = nil;
  id<MTLFunction> function = [library(kConstants) newFunctionWithName:@"k"
                                                       constantValues:values
                                                                error:&error];
  CHECK(function && !error);
  id<MTLComputePipelineState> state = [device() newComputePipelineStateWithFunction:function
                                                                              error:&error];
  CHECK(state && !error);
  return state;
}

std::vector<float> run(id<MTLComputePipelineState> state, bool with_extra) {
  id<MTLBuffer> x = floats({1, 2, 3, 4}), extra = floats({0, 0, 0, 0});
  id<MTLCommandBuffer> commands = [[device() newCommandQueue] commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:state];
  [encoder setBuffer:x offset:0 atIndex:0];
  if (with_extra) [encoder setBuffer:extra offset:0 atIndex:1];
  [encoder dispatchThreads:MTLSizeMake(4, 1, 1) threadsPerThreadgroup:MTLSizeMake(4, 1, 1)];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusCompleted);
  for (int i = 0; i < 4; ++i) CHECK(contents(extra)[i] == (with_extra ? 7 : 0));
  return {contents(x), contents(x) + 4};
}

}  // namespace

TEST(functions) {
  id<MTLLibrary> made = library(kConstants);
  CHECK(made.functionNames.count == 1 && [made.functionNames containsObject:@"k"]);
  CHECK(made.device == device());
  id<MTLFunction> function = [made newFunctionWithName:@"k"];
  CHECK(function.functionType == MTLFunctionTypeKernel && [function.name isEqualToString:@"k"]);
  CHECK(![made newFunctionWithName:@"other"]);
  NSDictionary<NSString*, MTLFunctionConstant*>* constants = function.functionConstantsDictionary;
  CHECK(constants.count == 3);
  CHECK(constants[@"scale"].index == 0 && constants[@"scale"].type == MTLDataTypeInt);
  CHECK(constants[@"negate"].index == 1 && constants[@"negate"].type == MTLDataTypeBool);
  CHECK(constants[@"offsets"].index == 2 && constants[@"offsets"].type == MTLDataTypeFloat4);
}

TEST(compile_error_has_the_line) {
  NSError* error = nil;
  NSString* source = @"#include <metal_stdlib>\nkernel void k(device float* x [[buffer(0)]]) {\n"
                     @"  x[0] = unknown;\n}\n";
  CHECK(![device() newLibraryWithSource:source options:nil error:&error]);
  CHECK([error.domain isEqualToString:MTLLibraryErrorDomain]);
  CHECK(error.code == MTLLibraryErrorCompileFailure);
  CHECK_CONTAINS(error.localizedDescription, "program_source:3:10: error:");
  CHECK_CONTAINS(error.localizedDescription, "unknown");
  CHECK(![device() newLibraryWithSource:source options:nil error:nil]);
}

TEST(macros) {
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
  options.preprocessorMacros = @{@"VALUE" : @5, @"NAME" : @"five"};
  NSError* error = nil;
  id<MTLLibrary> made = [device()
      newLibraryWithSource:@"#include <metal_stdlib>\n"
                           @"kernel void NAME(device float* x [[buffer(0)]]) { x[0] = VALUE; }"
                   options:options
                     error:&error];
  CHECK(made && !error);
  id<MTLBuffer> x = floats({0});
  id<MTLCommandBuffer> commands = [[device() newCommandQueue] commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:pipeline(made, @"five")];
  [encoder setBuffer:x offset:0 atIndex:0];
  [encoder dispatchThreads:MTLSizeMake(1, 1, 1) threadsPerThreadgroup:MTLSizeMake(1, 1, 1)];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(contents(x)[0] == 5);
}

TEST(math_modes_are_one_setting) {
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
  CHECK(options.mathMode == MTLMathModeFast && options.fastMathEnabled);
  options.fastMathEnabled = NO;
  CHECK(options.mathMode == MTLMathModeSafe);
  options.mathMode = MTLMathModeFast;
  CHECK(options.fastMathEnabled);
}

TEST(constants_by_index) {
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  const int scale = 10;
  const bool negate = true;
  const float offsets[4] = {.5f, 0, 0, 1};
  [values setConstantValue:&scale type:MTLDataTypeInt atIndex:0];
  [values setConstantValue:&negate type:MTLDataTypeBool atIndex:1];
  [values setConstantValue:offsets type:MTLDataTypeFloat4 atIndex:2];
  CHECK((run(specialized(values), true) == std::vector<float>{-9.5, -20, -30, -39}));
}

TEST(constants_by_name) {
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  const bool negate = false;
  const float offsets[4] = {};
  const int scale = 3;
  [values setConstantValue:&scale type:MTLDataTypeInt withName:@"scale"];
  [values setConstantValue:&negate type:MTLDataTypeBool withName:@"negate"];
  [values setConstantValue:offsets type:MTLDataTypeFloat4 withName:@"offsets"];
  CHECK((run(specialized(values), false) == std::vector<float>{3, 6, 9, 12}));
}

TEST(constants_left_out) {
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  const bool negate = false;
  const float offsets[4] = {};
  [values setConstantValue:&negate type:MTLDataTypeBool atIndex:1];
  [values setConstantValue:offsets type:MTLDataTypeFloat4 atIndex:2];
  CHECK((run(specialized(values), false) == std::vector<float>{1, 2, 3, 4}));
}

// Pipelines of one library with other constants do not disturb each other.
TEST(constants_of_two_pipelines) {
  const bool negate = false;
  const float offsets[4] = {};
  id<MTLComputePipelineState> states[2];
  for (int scale = 2; scale < 4; ++scale) {
    MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
    [values setConstantValue:&scale type:MTLDataTypeInt atIndex:0];
    [values setConstantValue:&negate type:MTLDataTypeBool atIndex:1];
    [values setConstantValue:offsets type:MTLDataTypeFloat4 atIndex:2];
    states[scale - 2] = specialized(values);
  }
  CHECK((run(states[0], false) == std::vector<float>{2, 4, 6, 8}));
  CHECK((run(states[1], false) == std::vector<float>{3, 6, 9, 12}));
  CHECK((run(states[0], false) == std::vector<float>{2, 4, 6, 8}));
}

TEST(constant_of_another_type) {
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  const float scale = 3;
  [values setConstantValue:&scale type:MTLDataTypeFloat atIndex:0];
  NSError* error = nil;
  CHECK(![library(kConstants) newFunctionWithName:@"k" constantValues:values error:&error]);
  CHECK_CONTAINS(error.localizedDescription, "scale");
}

TEST(function_that_is_not_there) {
  NSError* error = nil;
  CHECK(![library(kConstants) newFunctionWithName:@"other"
                                   constantValues:[[MTLFunctionConstantValues alloc] init]
                                            error:&error]);
  CHECK(error.code == MTLLibraryErrorFunctionNotFound);
}

TEST(asynchronous_compilation) {
  dispatch_semaphore_t done = dispatch_semaphore_create(0);
  __block id<MTLLibrary> made = nil;
  [device() newLibraryWithSource:kConstants
                         options:nil
               completionHandler:^(id<MTLLibrary> compiled, NSError* error) {
                 CHECK(!error);
                 made = compiled;
                 dispatch_semaphore_signal(done);
               }];
  dispatch_semaphore_wait(done, DISPATCH_TIME_FOREVER);
  __block id<MTLComputePipelineState> state = nil;
  [device()
      newComputePipelineStateWithFunction:[made newFunctionWithName:@"k"]
                        completionHandler:^(id<MTLComputePipelineState> compiled, NSError* error) {
                          CHECK(!error);
                          state = compiled;
                          dispatch_semaphore_signal(done);
                        }];
  dispatch_semaphore_wait(done, DISPATCH_TIME_FOREVER);
  CHECK(state);
}

// A library compiled ahead of time (argv of the test program: none; SOFTMETAL_TEST_LIBRARY).
TEST(library_from_file) {
  NSString* path = @(getenv("SOFTMETAL_TEST_LIBRARY"));
  NSError* error = nil;
  id<MTLLibrary> made = [device() newLibraryWithURL:[NSURL fileURLWithPath:path] error:&error];
  CHECK(made && !error && [made.functionNames containsObject:@"saxpy"]);
  NSData* bytes = [NSData dataWithContentsOfFile:path];
  dispatch_data_t data =
      dispatch_data_create(bytes.bytes, bytes.length, nil, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
  id<MTLLibrary> again = [device() newLibraryWithData:data error:&error];
  CHECK(again && !error && [again.functionNames containsObject:@"saxpy"]);
  pipeline(again, @"saxpy");
}

TEST(library_of_no_file) {
  NSError* error = nil;
  CHECK(![device() newLibraryWithFile:@"/nowhere/default.metallib" error:&error]);
  CHECK(error.code == MTLLibraryErrorFileNotFound);
}

TEST(library_of_other_bytes) {
  NSError* error = nil;
  dispatch_data_t data = dispatch_data_create("MTLB", 4, nil, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
  CHECK(![device() newLibraryWithData:data error:&error]);
  CHECK_CONTAINS(error.localizedDescription, "Invalid library file");
}

// --- Pipelines ---

TEST(limits_of_pipelines) {
  id<MTLComputePipelineState> state = pipeline(@"twice");
  CHECK(state.threadExecutionWidth == 32 && state.maxTotalThreadsPerThreadgroup == 1024);
  CHECK(state.staticThreadgroupMemoryLength == 0);
  CHECK(pipeline(@"small").maxTotalThreadsPerThreadgroup == 64);
  CHECK(pipeline(@"static_memory").staticThreadgroupMemoryLength == 20000);
  MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
  descriptor.computeFunction = [library(kConstants) newFunctionWithName:@"k"];
  descriptor.maxTotalThreadsPerThreadgroup = 128;
  descriptor.label = @"labelled";
  NSError* error = nil;
  state = [device() newComputePipelineStateWithDescriptor:descriptor
                                                  options:MTLPipelineOptionNone
                                               reflection:nil
                                                    error:&error];
  CHECK(state.maxTotalThreadsPerThreadgroup == 128 && [state.label isEqualToString:@"labelled"]);
}

TEST(reflection) {
  MTLComputePipelineReflection* reflection = nil;
  NSError* error = nil;
  id<MTLLibrary> made = library(@R"(
#include <metal_stdlib>
using namespace metal;
struct Parameters { float4 a; int b; };
constant bool has_c [[function_constant(0)]];
kernel void k(device float4* a [[buffer(2)]], constant Parameters& p [[buffer(5)]],
              device const half* c [[buffer(7), function_constant(has_c)]],
              threadgroup float* t [[threadgroup(1)]], uint i [[thread_position_in_grid]]) {
  a[i] = p.a; t[i] = p.b; if (has_c) a[i] += float(c[i]);
})");
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  const bool has_c = false;
  [values setConstantValue:&has_c type:MTLDataTypeBool atIndex:0];
  id<MTLFunction> function = [made newFunctionWithName:@"k" constantValues:values error:&error];
  CHECK([device() newComputePipelineStateWithFunction:function
                                              options:MTLPipelineOptionBindingInfo
                                           reflection:&reflection
                                                error:&error]);
  CHECK(reflection.bindings.count == 4);
  id<MTLBufferBinding> a = static_cast<id<MTLBufferBinding>>(reflection.bindings[0]);
  CHECK([a.name isEqualToString:@"a"] && a.index == 2 && a.type == MTLBindingTypeBuffer);
  CHECK(a.access == MTLBindingAccessReadWrite && a.used);
  CHECK(a.bufferDataType == MTLDataTypeFloat4 && a.bufferDataSize == 16 && a.bufferAlignment == 16);
  id<MTLBufferBinding> p = static_cast<id<MTLBufferBinding>>(reflection.bindings[1]);
  CHECK(p.index == 5 && p.bufferDataType == MTLDataTypeStruct && p.bufferDataSize == 32);
  CHECK(p.access == MTLBindingAccessReadOnly);
  CHECK(!reflection.bindings[2].used && reflection.bindings[2].index == 7);
  CHECK(reflection.bindings[3].type == MTLBindingTypeThreadgroupMemory);
  CHECK(reflection.bindings[3].index == 1);
}

TEST(binary_archive) {
  NSError* error = nil;
  NSURL* url = [NSURL fileURLWithPath:[folder() stringByAppendingPathComponent:@"archive"]];
  MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
  descriptor.computeFunction = [library(kConstants) newFunctionWithName:@"k"];
  MTLBinaryArchiveDescriptor* empty = [[MTLBinaryArchiveDescriptor alloc] init];
  id<MTLBinaryArchive> archive = [device() newBinaryArchiveWithDescriptor:empty error:&error];
  CHECK(archive);
  const auto make = [&](id<MTLBinaryArchive> from) {
    descriptor.binaryArchives = @[ from ];
    error = nil;
    return [device() newComputePipelineStateWithDescriptor:descriptor
                                                   options:MTLPipelineOptionFailOnBinaryArchiveMiss
                                                reflection:nil
                                                     error:&error];
  };
  CHECK(!make(archive) && error);
  CHECK([archive addComputePipelineFunctionsWithDescriptor:descriptor error:&error]);
  CHECK(make(archive));
  CHECK([archive serializeToURL:url error:&error]);

  MTLBinaryArchiveDescriptor* stored = [[MTLBinaryArchiveDescriptor alloc] init];
  stored.url = url;
  id<MTLBinaryArchive> again = [device() newBinaryArchiveWithDescriptor:stored error:&error];
  CHECK(again && make(again));

  CHECK([@"not an archive" writeToFile:url.path
                            atomically:YES
                              encoding:NSUTF8StringEncoding
                                 error:nil]);
  CHECK(![device() newBinaryArchiveWithDescriptor:stored error:&error]);
  CHECK([error.domain isEqualToString:MTLBinaryArchiveDomain]);
  CHECK(error.code == MTLBinaryArchiveErrorInvalidFile);
}

// --- Faults ---

TEST(fault_compile_failure) {
  CHECK(softmetal_inject_fault("compile_failure", 1));
  NSError* error = nil;
  CHECK(![device() newLibraryWithSource:kConstants options:nil error:&error]);
  CHECK(error.code == MTLLibraryErrorCompileFailure);
  CHECK([device() newLibraryWithSource:kConstants options:nil error:&error]);
}

TEST(fault_old_language) {
  NSString* source = @"#ifdef __HAVE_BFLOAT__\n"
                      "kernel void new_kernel() {}\n"
                      "#else\n"
                      "kernel void old_kernel() {}\n"
                      "#endif";
  const auto name = [&] {
    return [device() newLibraryWithSource:source options:nil error:nil].functionNames.firstObject;
  };
  CHECK(softmetal_inject_fault("old_language", 1));
  CHECK([name() isEqualToString:@"old_kernel"]);
  CHECK([name() isEqualToString:@"new_kernel"]);
}

TEST(fault_pipeline_failure) {
  id<MTLFunction> function = [library(kConstants) newFunctionWithName:@"k"];
  CHECK(softmetal_inject_fault("pipeline_failure", 1));
  NSError* error = nil;
  CHECK(![device() newComputePipelineStateWithFunction:function error:&error]);
  CHECK(error);
  CHECK([device() newComputePipelineStateWithFunction:function error:&error]);
}

int main(int argc, const char** argv) { return run_tests(argc, argv); }
