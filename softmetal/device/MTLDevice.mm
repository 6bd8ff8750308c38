#include <sys/sysinfo.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

#include "softmetal/device/device.h"
#include "softmetal/device/faults.h"

namespace softmetal {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

namespace {

constexpr NSUInteger kMaxBufferLength = NSUInteger{16} << 30;

uint64_t physical_memory() {
  struct sysinfo info = {};
  return sysinfo(&info) == 0 ? uint64_t{info.totalram} * info.mem_unit : uint64_t{1} << 33;
}

void check_length(const char* method, NSUInteger length) {
  if (length == 0) misuse(method, "Buffer Validation: length 0 must not be 0.");
  if (length > kMaxBufferLength) {
    misuse(method, "Buffer Validation: length " + std::to_string(length) + " must not exceed " +
                       std::to_string(kMaxBufferLength) + ".");
  }
}

}  // namespace
}  // namespace softmetal

using softmetal::Fault;
using softmetal::fault;
using softmetal::misuse;

@implementation SoftmetalDevice {
  std::atomic<size_t> _allocated;
}

- (NSString*)name {
  return @"Software Metal";
}
- (uint64_t)registryID {
  return 0x736f66746d746cull;
}
- (MTLSize)maxThreadsPerThreadgroup {
  const NSUInteger most = softmetal::kMaxThreadsPerThreadgroup;
  return MTLSizeMake(most, most, most);
}
- (BOOL)isLowPower {
  return NO;
}
- (BOOL)isHeadless {
  return YES;
}
- (BOOL)isRemovable {
  return NO;
}
- (BOOL)hasUnifiedMemory {
  return YES;
}
- (uint64_t)recommendedMaxWorkingSetSize {
  return softmetal::physical_memory() / 4 * 3;
}
- (MTLDeviceLocation)location {
  return MTLDeviceLocationBuiltIn;
}
- (NSUInteger)locationNumber {
  return 0;
}
- (uint64_t)maxTransferRate {
  return 0;
}
- (MTLReadWriteTextureTier)readWriteTextureSupport {
  return MTLReadWriteTextureTierNone;
}
- (MTLArgumentBuffersTier)argumentBuffersSupport {
  return MTLArgumentBuffersTier1;
}
- (NSUInteger)currentAllocatedSize {
  return _allocated.load();
}
- (NSUInteger)maxThreadgroupMemoryLength {
  return softmetal::kThreadgroupMemoryLimit;
}
- (NSUInteger)maxBufferLength {
  return softmetal::kMaxBufferLength;
}
- (NSUInteger)maxArgumentBufferSamplerCount {
  return 0;
}
- (BOOL)supportsFunctionPointers {
  return NO;
}
- (BOOL)supportsDynamicLibraries {
  return NO;
}
- (BOOL)supportsRaytracing {
  return NO;
}

// What an M1 answers; textures, which the families promise too, are not there.
- (BOOL)supportsFamily:(MTLGPUFamily)family {
  if (fault(Fault::kOldFamily)) {
    return family >= MTLGPUFamilyApple1 && family <= MTLGPUFamilyApple5;
  }
  return (family >= MTLGPUFamilyApple1 && family <= MTLGPUFamilyApple7) ||
         (family >= MTLGPUFamilyMac1 && family <= MTLGPUFamilyMac2) ||
         (family >= MTLGPUFamilyCommon1 && family <= MTLGPUFamilyCommon3) ||
         family == MTLGPUFamilyMetal3;
}
- (BOOL)supportsFeatureSet:(MTLFeatureSet)featureSet {
  return !fault(Fault::kOldFamily);
}

- (BOOL)softmetal_reserve:(size_t)bytes {
  if (fault(Fault::kOutOfMemory)) return NO;
  if (_allocated.fetch_add(bytes) + bytes <= softmetal::physical_memory()) return YES;
  _allocated -= bytes;
  return NO;
}
- (void)softmetal_release:(size_t)bytes {
  _allocated -= bytes;
}

// --- Queues and synchronisation ---

- (id<MTLCommandQueue>)newCommandQueue {
  return [self newCommandQueueWithMaxCommandBufferCount:64];
}
- (id<MTLCommandQueue>)newCommandQueueWithMaxCommandBufferCount:(NSUInteger)maximum {
  if (maximum == 0) {
    misuse("-[MTLDebugDevice newCommandQueueWithMaxCommandBufferCount:]",
           "maxCommandBufferCount(0) must be > 0.");
  }
  return [[SoftmetalCommandQueue alloc] initWithDevice:self maximum:maximum];
}
- (id<MTLCommandQueue>)newCommandQueueWithDescriptor:(MTLCommandQueueDescriptor*)descriptor {
  return [self newCommandQueueWithMaxCommandBufferCount:descriptor.maxCommandBufferCount];
}
- (id<MTLFence>)newFence {
  return [[SoftmetalFence alloc] initWithDevice:self];
}
- (id<MTLEvent>)newEvent {
  return [[SoftmetalEvent alloc] initWithDevice:self];
}
- (id<MTLSharedEvent>)newSharedEvent {
  return [[SoftmetalEvent alloc] initWithDevice:self];
}
- (id<MTLResidencySet>)newResidencySetWithDescriptor:(MTLResidencySetDescriptor*)descriptor
                                               error:(NSError**)error {
  return [[SoftmetalResidencySet alloc] initWithDevice:self descriptor:descriptor];
}
- (void)sampleTimestamps:(MTLTimestamp*)cpuTimestamp gpuTimestamp:(MTLTimestamp*)gpuTimestamp {
  *cpuTimestamp = *gpuTimestamp = static_cast<MTLTimestamp>(softmetal::now() * 1e9);
}

// --- Buffers ---

- (MTLSizeAndAlign)heapBufferSizeAndAlignWithLength:(NSUInteger)length
                                            options:(MTLResourceOptions)options {
  return {(length + 255) / 256 * 256, 256};
}
- (id<MTLHeap>)newHeapWithDescriptor:(MTLHeapDescriptor*)descriptor {
  if (descriptor.size == 0) {
    misuse("-[MTLDebugDevice newHeapWithDescriptor:]", "descriptor size(0) must be > 0.");
  }
  return [[SoftmetalHeap alloc] initWithDevice:self descriptor:descriptor];
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
  softmetal::check_length("-[MTLDebugDevice newBufferWithLength:options:]", length);
  auto memory = softmetal::Memory::allocate(self, length);
  if (!memory) return nil;
  return [[SoftmetalBuffer alloc] initWithDevice:self memory:std::move(memory) options:options];
}
- (id<MTLBuffer>)newBufferWithBytes:(const void*)pointer
                             length:(NSUInteger)length
                            options:(MTLResourceOptions)options {
  const char* method = "-[MTLDebugDevice newBufferWithBytes:length:options:]";
  softmetal::check_length(method, length);
  if (!pointer) misuse(method, "Buffer Validation: pointer must not be nil.");
  if ((options >> MTLResourceStorageModeShift & 15) == MTLStorageModePrivate) {
    misuse(method, "Buffer Validation: storage mode private has no initial contents.");
  }
  auto memory = softmetal::Memory::allocate(self, length);
  if (!memory) return nil;
  memcpy(memory->address(), pointer, length);
  return [[SoftmetalBuffer alloc] initWithDevice:self memory:std::move(memory) options:options];
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void* pointer, NSUInteger length))deallocator {
  const char* method = "-[MTLDebugDevice newBufferWithBytesNoCopy:length:options:deallocator:]";
  softmetal::check_length(method, length);
  const auto page = static_cast<uintptr_t>(getpagesize());
  if (reinterpret_cast<uintptr_t>(pointer) % page != 0) {
    char text[32];
    snprintf(text, sizeof text, "%p", pointer);
    misuse(method, std::string("Buffer Validation: pointer ") + text + " is not " +
                       std::to_string(page) + " byte aligned.");
  }
  if (length % page != 0) {
    misuse(method, "Buffer Validation: length " + std::to_string(length) + " is not " +
                       std::to_string(page) + " byte aligned.");
  }
  if ((options >> MTLResourceStorageModeShift & 15) == MTLStorageModePrivate) {
    misuse(method, "Buffer Validation: storage mode must not be private.");
  }
  if (fault(Fault::kOutOfMemory) || fault(Fault::kNoCopyRefused)) return nil;
  auto memory = softmetal::Memory::wrap(pointer, length, deallocator);
  return [[SoftmetalBuffer alloc] initWithDevice:self memory:std::move(memory) options:options];
}

// --- Libraries: MTLLibrary.mm has those made from source ---

- (id<MTLLibrary>)newDefaultLibrary {
  return [self newDefaultLibraryWithBundle:NSBundle.mainBundle error:nil];
}
- (id<MTLLibrary>)newDefaultLibraryWithBundle:(NSBundle*)bundle error:(NSError**)error {
  NSString* path = [bundle pathForResource:@"default" ofType:@"metallib"];
  if (path) return [self newLibraryWithFile:path error:error];
  softmetal::set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorFileNotFound,
                       "no default library (default.metallib) was found");
  return nil;
}
- (id<MTLLibrary>)newLibraryWithFile:(NSString*)path error:(NSError**)error {
  return [[SoftmetalLibrary alloc] initWithDevice:self path:path error:error];
}
- (id<MTLLibrary>)newLibraryWithURL:(NSURL*)url error:(NSError**)error {
  return [self newLibraryWithFile:url.path error:error];
}
- (id<MTLLibrary>)newLibraryWithData:(dispatch_data_t)data error:(NSError**)error {
  return softmetal::library_from_data(self, data, error);
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError**)error {
  if (!source) {
    misuse("-[MTLDebugDevice newLibraryWithSource:options:error:]", "source must not be nil.");
  }
  return softmetal::library_from_source(self, source, options, error);
}
- (void)newLibraryWithSource:(NSString*)source
                     options:(MTLCompileOptions*)options
           completionHandler:(MTLNewLibraryCompletionHandler)handler {
  NSString* text = [source copy];
  MTLCompileOptions* own = [options copy];
  dispatch_async(dispatch_get_global_queue(QOS_CLASS_DEFAULT, 0), ^{
    NSError* error = nil;
    id<MTLLibrary> library = [self newLibraryWithSource:text options:own error:&error];
    handler(library, error);
  });
}

// --- Pipelines ---

- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                                             error:(NSError**)error {
  return [self newComputePipelineStateWithFunction:function
                                           options:MTLPipelineOptionNone
                                        reflection:nil
                                             error:error];
}
- (id<MTLComputePipelineState>)
    newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                options:(MTLPipelineOption)options
                             reflection:(MTLAutoreleasedComputePipelineReflection*)reflection
                                  error:(NSError**)error {
  if (!function) {
    misuse("-[MTLDebugDevice newComputePipelineStateWithFunction:error:]",
           "computeFunction must not be nil.");
  }
  MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
  descriptor.computeFunction = function;
  return [self newComputePipelineStateWithDescriptor:descriptor
                                             options:options
                                          reflection:reflection
                                               error:error];
}
- (id<MTLComputePipelineState>)
    newComputePipelineStateWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                  options:(MTLPipelineOption)options
                               reflection:(MTLAutoreleasedComputePipelineReflection*)reflection
                                    error:(NSError**)error {
  if (!descriptor.computeFunction) {
    misuse("-[MTLDebugDevice newComputePipelineStateWithDescriptor:options:reflection:error:]",
           "computeFunction must not be nil.");
  }
  SoftmetalComputePipelineState* state = [SoftmetalComputePipelineState stateWithDevice:self
                                                                             descriptor:descriptor
                                                                                options:options
                                                                                  error:error];
  if (reflection) *reflection = state.reflection;
  return state;
}
- (void)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                          completionHandler:(MTLNewComputePipelineStateCompletionHandler)handler {
  [self newComputePipelineStateWithFunction:function
                                    options:MTLPipelineOptionNone
                          completionHandler:^(id<MTLComputePipelineState> state,
                                              MTLComputePipelineReflection*, NSError* error) {
                            handler(state, error);
                          }];
}
- (void)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                    options:(MTLPipelineOption)options
                          completionHandler:
                              (MTLNewComputePipelineStateWithReflectionCompletionHandler)handler {
  MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
  descriptor.computeFunction = function;
  [self newComputePipelineStateWithDescriptor:descriptor options:options completionHandler:handler];
}
- (void)newComputePipelineStateWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                      options:(MTLPipelineOption)options
                            completionHandler:
                                (MTLNewComputePipelineStateWithReflectionCompletionHandler)handler {
  MTLComputePipelineDescriptor* own = [descriptor copy];
  dispatch_async(dispatch_get_global_queue(QOS_CLASS_DEFAULT, 0), ^{
    NSError* error = nil;
    MTLComputePipelineReflection* reflection = nil;
    id<MTLComputePipelineState> state = [self newComputePipelineStateWithDescriptor:own
                                                                            options:options
                                                                         reflection:&reflection
                                                                              error:&error];
    handler(state, reflection, error);
  });
}
- (id<MTLBinaryArchive>)newBinaryArchiveWithDescriptor:(MTLBinaryArchiveDescriptor*)descriptor
                                                 error:(NSError**)error {
  return [[SoftmetalBinaryArchive alloc] initWithDevice:self descriptor:descriptor error:error];
}

@end

id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
  if (fault(Fault::kNilDevice)) return nil;
  static SoftmetalDevice* device = [[SoftmetalDevice alloc] init];
  return device;
}

NSArray<id<MTLDevice>>* MTLCopyAllDevices(void) {
  id<MTLDevice> device = MTLCreateSystemDefaultDevice();
  return device ? @[ device ] : @[];
}

NSArray<id<MTLDevice>>* MTLCopyAllDevicesWithObserver(id<NSObject> __strong* observer,
                                                      MTLDeviceNotificationHandler) {
  *observer = [[NSObject alloc] init];
  return MTLCopyAllDevices();
}

void MTLRemoveDeviceObserver(id<NSObject>) {}
