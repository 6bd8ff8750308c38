#include <algorithm>

#include "softmetal/device/device.h"
#include "softmetal/device/faults.h"

using softmetal::Argument;
using softmetal::ArgumentKind;
using softmetal::set_error;
using softmetal::to_nsstring;
using softmetal::to_string;

namespace {

// What Metal's compiler and driver call themselves in errors of pipelines.
NSErrorDomain const kCompilerErrorDomain = @"CompilerError";
constexpr NSInteger kCompilerFailure = 2;

}  // namespace

// --- Descriptors ---

@implementation MTLPipelineBufferDescriptor

- (id)copyWithZone:(NSZone*)zone {
  MTLPipelineBufferDescriptor* copy = [[MTLPipelineBufferDescriptor alloc] init];
  copy.mutability = _mutability;
  return copy;
}

@end

@implementation MTLPipelineBufferDescriptorArray {
  MTLPipelineBufferDescriptor* _descriptors[softmetal::kBufferSlots];
}

- (void)softmetal_check:(NSUInteger)index {
  if (index < softmetal::kBufferSlots) return;
  softmetal::misuse("-[MTLPipelineBufferDescriptorArray objectAtIndexedSubscript:]",
                    "index(" + std::to_string(index) + ") must be < 31.");
}
- (MTLPipelineBufferDescriptor*)objectAtIndexedSubscript:(NSUInteger)index {
  [self softmetal_check:index];
  if (!_descriptors[index]) _descriptors[index] = [[MTLPipelineBufferDescriptor alloc] init];
  return _descriptors[index];
}
- (void)setObject:(MTLPipelineBufferDescriptor*)buffer atIndexedSubscript:(NSUInteger)index {
  [self softmetal_check:index];
  _descriptors[index] = [buffer copy];
}

@end

@implementation MTLComputePipelineDescriptor

@synthesize buffers = _buffers;

- (instancetype)init {
  self = [super init];
  [self reset];
  return self;
}
- (void)reset {
  _label = nil;
  _computeFunction = nil;
  _threadGroupSizeIsMultipleOfThreadExecutionWidth = NO;
  _maxTotalThreadsPerThreadgroup = 0;
  _buffers = [[MTLPipelineBufferDescriptorArray alloc] init];
  _supportIndirectCommandBuffers = NO;
  _binaryArchives = nil;
  _shaderValidation = MTLShaderValidationDefault;
}
- (id)copyWithZone:(NSZone*)zone {
  MTLComputePipelineDescriptor* copy = [[MTLComputePipelineDescriptor alloc] init];
  copy.label = _label;
  copy.computeFunction = _computeFunction;
  copy.threadGroupSizeIsMultipleOfThreadExecutionWidth =
      _threadGroupSizeIsMultipleOfThreadExecutionWidth;
  copy.maxTotalThreadsPerThreadgroup = _maxTotalThreadsPerThreadgroup;
  for (NSUInteger i = 0; i < softmetal::kBufferSlots; ++i) copy.buffers[i] = _buffers[i];
  copy.supportIndirectCommandBuffers = _supportIndirectCommandBuffers;
  copy.binaryArchives = _binaryArchives;
  copy.shaderValidation = _shaderValidation;
  return copy;
}

@end

// --- Reflection ---

@interface MTLArgument ()
- (instancetype)initWithArgument:(const Argument&)argument isEnabled:(BOOL)isEnabled;
@end

@implementation MTLArgument {
  const Argument* _argument;
}
@synthesize name = _name, active = _active;

- (instancetype)initWithArgument:(const Argument&)argument isEnabled:(BOOL)isEnabled {
  self = [super init];
  _argument = &argument;
  _name = to_nsstring(argument.name);
  _active = isEnabled;
  return self;
}
- (MTLArgumentType)type {
  return _argument->kind == ArgumentKind::kThreadgroup ? MTLArgumentTypeThreadgroupMemory
                                                       : MTLArgumentTypeBuffer;
}
- (MTLArgumentAccess)access {
  return _argument->is_writable ? MTLBindingAccessReadWrite : MTLBindingAccessReadOnly;
}
- (NSUInteger)index {
  return _argument->index;
}
- (NSUInteger)bufferAlignment {
  return std::max<NSUInteger>(_argument->element_alignment, 1);
}
- (NSUInteger)bufferDataSize {
  return _argument->element_size;
}
- (MTLDataType)bufferDataType {
  const MTLDataType type = softmetal::data_type(_argument->type_name);
  return type == MTLDataTypeNone ? MTLDataTypeStruct : type;
}
- (NSUInteger)threadgroupMemoryAlignment {
  return self.bufferAlignment;
}
- (NSUInteger)threadgroupMemoryDataSize {
  return _argument->element_size;
}
- (NSUInteger)arrayLength {
  return 1;
}
- (NSString*)description {
  return [NSString stringWithFormat:@"<MTLArgument %@ index %lu type %s>", _name,
                                    static_cast<unsigned long>(self.index), _argument->type_name];
}

@end

// The newer names of the same.
@interface SoftmetalBinding : NSObject <MTLBufferBinding, MTLThreadgroupBinding>
- (instancetype)initWithArgument:(MTLArgument*)argument;
@end

@implementation SoftmetalBinding {
  MTLArgument* _argument;
}

- (instancetype)initWithArgument:(MTLArgument*)argument {
  self = [super init];
  _argument = argument;
  return self;
}
- (NSString*)name {
  return _argument.name;
}
- (MTLBindingType)type {
  return static_cast<MTLBindingType>(_argument.type);
}
- (MTLBindingAccess)access {
  return _argument.access;
}
- (NSUInteger)index {
  return _argument.index;
}
- (BOOL)isUsed {
  return _argument.active;
}
- (BOOL)isArgument {
  return YES;
}
- (NSUInteger)bufferAlignment {
  return _argument.bufferAlignment;
}
- (NSUInteger)bufferDataSize {
  return _argument.bufferDataSize;
}
- (MTLDataType)bufferDataType {
  return _argument.bufferDataType;
}
- (NSUInteger)threadgroupMemoryAlignment {
  return _argument.threadgroupMemoryAlignment;
}
- (NSUInteger)threadgroupMemoryDataSize {
  return _argument.threadgroupMemoryDataSize;
}
- (NSString*)description {
  return _argument.description;
}

@end

@interface MTLComputePipelineReflection ()
- (instancetype)initWithKernel:(const softmetal::Kernel&)kernel;
@end

@implementation MTLComputePipelineReflection

@synthesize arguments = _arguments, bindings = _bindings;

- (instancetype)initWithKernel:(const softmetal::Kernel&)kernel {
  self = [super init];
  NSMutableArray<MTLArgument*>* arguments = [NSMutableArray array];
  NSMutableArray<id<MTLBinding>>* bindings = [NSMutableArray array];
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const Argument& argument = kernel.arguments[i];
    if (argument.kind != ArgumentKind::kBuffer && argument.kind != ArgumentKind::kThreadgroup) {
      continue;
    }
    MTLArgument* each =
        [[MTLArgument alloc] initWithArgument:argument
                                    isEnabled:!argument.is_enabled || argument.is_enabled()];
    [arguments addObject:each];
    [bindings addObject:[[SoftmetalBinding alloc] initWithArgument:each]];
  }
  _arguments = arguments;
  _bindings = bindings;
  return self;
}

@end

// --- State ---

@implementation SoftmetalComputePipelineState {
  SoftmetalDevice* _device;
  NSString* _label;
  SoftmetalLibrary* _library;  // whose file the kernel is of
  std::shared_ptr<softmetal::Image> _image;
  const softmetal::Kernel* _kernel;
  NSUInteger _maxTotalThreadsPerThreadgroup;
  BOOL _supportIndirectCommandBuffers;
  MTLComputePipelineReflection* _reflection;
}

+ (instancetype)stateWithDevice:(SoftmetalDevice*)device
                     descriptor:(MTLComputePipelineDescriptor*)descriptor
                        options:(MTLPipelineOption)options
                          error:(NSError**)error {
  SoftmetalFunction* function = static_cast<SoftmetalFunction*>(descriptor.computeFunction);
  const std::string name = to_string(function.softmetal_kernelName);
  if (softmetal::fault(softmetal::Fault::kPipelineFailure)) {
    set_error(error, kCompilerErrorDomain, kCompilerFailure, "injected pipeline failure: " + name);
    return nil;
  }
  if (options & MTLPipelineOptionFailOnBinaryArchiveMiss) {
    BOOL hit = NO;
    for (SoftmetalBinaryArchive* archive in descriptor.binaryArchives) {
      hit = hit || [archive softmetal_contains:function.softmetal_key];
    }
    if (!hit) {
      set_error(error, kCompilerErrorDomain, kCompilerFailure,
                "Function " + name + " was not found in the binary archives");
      return nil;
    }
  }
  SoftmetalComputePipelineState* state = [[self alloc] init];
  state->_device = device;
  state->_label = [descriptor.label copy];
  state->_library = function.softmetal_library;
  state->_supportIndirectCommandBuffers = descriptor.supportIndirectCommandBuffers;
  std::string problem;
  if (function.softmetal_constants.empty()) {
    state->_image = state->_library.softmetal_image;
  } else {
    state->_image = softmetal::Image::open(to_string(state->_library.softmetal_path),
                                           function.softmetal_constants, &problem);
  }
  state->_kernel = state->_image ? state->_image->find(name) : nullptr;
  if (!state->_kernel) {
    set_error(error, kCompilerErrorDomain, kCompilerFailure, name + ": " + problem);
    return nil;
  }
  softmetal::record_pipeline(state->_image->pipeline(name));
  NSUInteger most = state->_kernel->max_total_threads_per_threadgroup;
  if (most == 0) most = softmetal::kMaxThreadsPerThreadgroup;
  const NSUInteger asked = descriptor.maxTotalThreadsPerThreadgroup;
  if (asked > softmetal::kMaxThreadsPerThreadgroup) {
    softmetal::misuse(
        "-[MTLDebugDevice newComputePipelineStateWithDescriptor:options:reflection:error:]",
        "maxTotalThreadsPerThreadgroup(" + std::to_string(asked) + ") must be <= 1024.");
  }
  state->_maxTotalThreadsPerThreadgroup = asked != 0 ? std::min(asked, most) : most;
  state->_reflection = [[MTLComputePipelineReflection alloc] initWithKernel:*state->_kernel];
  return state;
}

- (const softmetal::Kernel*)softmetal_kernel {
  return _kernel;
}
- (id<MTLDevice>)device {
  return _device;
}
- (NSString*)label {
  return _label;
}
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return _maxTotalThreadsPerThreadgroup;
}
- (NSUInteger)threadExecutionWidth {
  return softmetal::kSimdgroupWidth;
}
- (NSUInteger)staticThreadgroupMemoryLength {
  return *_kernel->static_threadgroup_bytes;
}
- (BOOL)supportIndirectCommandBuffers {
  return _supportIndirectCommandBuffers;
}
- (MTLResourceID)gpuResourceID {
  return {reinterpret_cast<uint64_t>(_kernel)};
}
- (MTLComputePipelineReflection*)reflection {
  return _reflection;
}

@end
