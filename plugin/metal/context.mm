#include "metal/context.h"

#include <cstdlib>

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

// A virtual machine's GPU may know more than the families that it reports.
bool accepts_any_family() {
  const char* given = std::getenv("JAX_GLUON_METAL_ANY_FAMILY");
  return given && std::string(given) == "1";
}

}  // namespace

Context::Context() : device_(find_device()), pins_(device_) {
  if (!device_) throw Error("no Metal device; implementation=\"cpu\" does without");
  if (![device_ supportsFamily:MTLGPUFamilyApple7] && !accepts_any_family()) {
    throw Error("the GPU \"" + std::string(device_.name.UTF8String) +
                "\" has no simdgroup matrices (MTLGPUFamilyApple7, of M1 and A14 and later); "
                "implementation=\"cpu\" does without");
  }
  queue_ = [device_ newCommandQueue];
  if (!queue_) throw Error("the Metal device made no command queue");
  archive_ =
      std::make_unique<Archive>(device_, std::string("metal-") + kShaderSourcesDigest + ".archive");
  if (const char* given = std::getenv("JAX_GLUON_METAL_COMMAND_PRODUCTS")) {
    char* end = nullptr;
    const long long value = std::strtoll(given, &end, 10);
    if (*given == '\0' || *end != '\0' || value < 1) {
      throw Error("JAX_GLUON_METAL_COMMAND_PRODUCTS is \"" + std::string(given) +
                  "\", expected an integer of at least 1");
    }
    products_of_a_command_buffer_ = value;
  }
}

id<MTLLibrary> Context::library(const std::string& stem) {
  __strong id<MTLLibrary>& library = libraries_[stem];
  if (library) return library;
  const char* source = shader_source(stem.c_str());
  if (!source) throw Error("no shader " + stem);
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
  if (@available(macOS 14.0, *)) {
    options.languageVersion = MTLLanguageVersion3_1;
  } else {
    options.languageVersion = MTLLanguageVersion3_0;
  }
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

bool Context::has_kernel(const std::string& stem, const std::string& name) {
  const std::lock_guard lock(mutex_);
  return [library(stem).functionNames containsObject:@(name.c_str())];
}

id<MTLComputePipelineState> Context::pipeline(const std::string& stem, const std::string& name,
                                              const Constants& constants) {
  const std::lock_guard lock(mutex_);
  __strong id<MTLComputePipelineState>& pipeline = pipelines_[{name, constants}];
  if (pipeline) return pipeline;
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  for (const auto& [index, value] : constants) {
    [values setConstantValue:&value type:MTLDataTypeInt atIndex:index];
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

void Context::check(id<MTLCommandBuffer> commands) {
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
