#include "metal/context.h"

#include "metal/shader_sources.h"

namespace jax_gluon::metal {
namespace {

std::string text_of(NSError* error) {
  return error ? std::string(error.localizedDescription.UTF8String) : "no reason given";
}

id<MTLDevice> find_device() {
  if (id<MTLDevice> device = MTLCreateSystemDefaultDevice()) return device;
  // Processes without a window server have no default device, but may have devices.
  for (id<MTLDevice> device in MTLCopyAllDevices()) return device;
  return nil;
}

const char* hint(NSInteger code) {
  switch (code) {
    case MTLCommandBufferErrorTimeout:
      return "; the GPU was busy too long: use smaller batches, or implementation=\"cpu\"";
    case MTLCommandBufferErrorOutOfMemory:
      return "; the GPU is out of memory: use smaller batches, or implementation=\"cpu\"";
    default:
      return "; implementation=\"cpu\" does without the GPU";
  }
}

}  // namespace

Context::Context() : device_(find_device()) {
  if (!device_) throw Error("no Metal device; implementation=\"cpu\" does without");
  if (![device_ supportsFamily:MTLGPUFamilyApple7]) {
    throw Error("the GPU \"" + std::string(device_.name.UTF8String) +
                "\" has no simdgroup matrices (MTLGPUFamilyApple7, of M1 and A14 and later); "
                "implementation=\"cpu\" does without");
  }
  is_software_ = [device_.name isEqualToString:@"Software Metal"];
  queue_ = [device_ newCommandQueue];
  if (!queue_) throw Error("the Metal device made no command queue");
  archive_ =
      std::make_unique<Archive>(device_, std::string("metal-") + kShaderSourcesDigest + ".archive");
}

id<MTLLibrary> Context::library(const std::string& stem) {
  __strong id<MTLLibrary>& library = libraries_[stem];
  if (library) return library;
  const char* source = shader_source(stem.c_str());
  if (!source) throw Error("no shader " + stem);
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
  options.languageVersion = MTLLanguageVersion3_1;
  // Infinities and NaN are what they are. (From macOS 15 on the name of this is mathMode.)
  options.fastMathEnabled = NO;
  NSError* error = nil;
  library = [device_ newLibraryWithSource:@(source) options:options error:&error];
  if (!library) {
    throw Error("Metal does not compile " + stem + ": " + text_of(error) +
                "; implementation=\"cpu\" does without");
  }
  return library;
}

id<MTLComputePipelineState> Context::pipeline(const std::string& stem, const std::string& name,
                                              const Constants& constants) {
  const std::lock_guard lock(mutex_);
  __strong id<MTLComputePipelineState>& pipeline = pipelines_[{name, constants}];
  if (pipeline) return pipeline;
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  for (const Constant& each : constants) {
    const bool flag = each.value != 0;
    const void* value = each.is_bool ? static_cast<const void*>(&flag) : &each.value;
    [values setConstantValue:value
                        type:each.is_bool ? MTLDataTypeBool : MTLDataTypeInt
                     atIndex:each.index];
  }
  NSError* error = nil;
  id<MTLFunction> function = [library(stem) newFunctionWithName:@(name.c_str())
                                                 constantValues:values
                                                          error:&error];
  if (function) {
    MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
    descriptor.computeFunction = function;
    descriptor.label = @(name.c_str());
    pipeline = archive_->pipeline(descriptor, &error);
  }
  if (!pipeline) {
    throw Error("Metal makes no pipeline of " + name + ": " + text_of(error) +
                "; implementation=\"cpu\" does without");
  }
  return pipeline;
}

id<MTLCommandBuffer> Context::command_buffer() {
  id<MTLCommandBuffer> commands = [queue_ commandBuffer];
  if (!commands) throw Error("the Metal device made no command buffer");
  return commands;
}

void Context::run(id<MTLCommandBuffer> commands) {
  [commands commit];
  [commands waitUntilCompleted];
  if (commands.status == MTLCommandBufferStatusCompleted) return;
  throw Error(text_of(commands.error) + hint(commands.error.code));
}

id<MTLBuffer> Context::scratch(size_t bytes) {
  id<MTLBuffer> buffer = [device_ newBufferWithLength:bytes > 0 ? bytes : 4
                                              options:MTLResourceStorageModePrivate];
  if (buffer) return buffer;
  throw Error("Metal has no memory for " + std::to_string(bytes) +
              " bytes of scratch; use smaller batches, or implementation=\"cpu\"");
}

}  // namespace jax_gluon::metal
