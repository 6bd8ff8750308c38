#include <stdlib.h>
#include <unistd.h>

#include "softmetal/device/device.h"

namespace softmetal {

std::shared_ptr<Memory> Memory::allocate(SoftmetalDevice* device, size_t length) {
  if (![device softmetal_reserve:length]) return nullptr;
  void* address = nullptr;
  if (posix_memalign(&address, static_cast<size_t>(getpagesize()), length) != 0) {
    [device softmetal_release:length];
    return nullptr;
  }
  memset(address, 0, length);
  std::shared_ptr<Memory> memory(new Memory);
  memory->address_ = static_cast<char*>(address);
  memory->length_ = length;
  memory->device_ = device;
  return memory;
}

std::shared_ptr<Memory> Memory::wrap(void* address, size_t length,
                                     void (^deallocator)(void* pointer, NSUInteger length)) {
  std::shared_ptr<Memory> memory(new Memory);
  memory->address_ = static_cast<char*>(address);
  memory->length_ = length;
  memory->deallocator_ = deallocator;
  return memory;
}

Memory::~Memory() {
  if (device_) {
    free(address_);
    [device_ softmetal_release:length_];
  } else if (deallocator_) {
    deallocator_(address_, length_);
  }
}

}  // namespace softmetal

@implementation SoftmetalBuffer {
  SoftmetalDevice* _device;
  std::shared_ptr<softmetal::Memory> _memory;
  MTLResourceOptions _options;
}
@synthesize label = _label;
@synthesize softmetal_heap = _softmetal_heap;

- (instancetype)initWithDevice:(SoftmetalDevice*)device
                        memory:(std::shared_ptr<softmetal::Memory>)memory
                       options:(MTLResourceOptions)options {
  self = [super init];
  _device = device;
  _memory = std::move(memory);
  _options = options;
  return self;
}
- (std::shared_ptr<softmetal::Memory>)softmetal_memory {
  return _memory;
}
- (id<MTLDevice>)device {
  return _device;
}
- (NSUInteger)length {
  return _memory->length();
}
- (NSUInteger)allocatedSize {
  return _memory->length();
}
- (uint64_t)gpuAddress {
  return reinterpret_cast<uint64_t>(_memory->address());
}
- (void*)contents {
  return self.storageMode == MTLStorageModePrivate ? nullptr : _memory->address();
}
- (MTLCPUCacheMode)cpuCacheMode {
  return static_cast<MTLCPUCacheMode>(_options >> MTLResourceCPUCacheModeShift & 15);
}
- (MTLStorageMode)storageMode {
  return static_cast<MTLStorageMode>(_options >> MTLResourceStorageModeShift & 15);
}
- (MTLHazardTrackingMode)hazardTrackingMode {
  const auto mode =
      static_cast<MTLHazardTrackingMode>(_options >> MTLResourceHazardTrackingModeShift & 3);
  return mode == MTLHazardTrackingModeDefault ? MTLHazardTrackingModeTracked : mode;
}
- (MTLResourceOptions)resourceOptions {
  return _options;
}
- (id<MTLHeap>)heap {
  return _softmetal_heap;
}
- (NSUInteger)heapOffset {
  return 0;
}
- (MTLPurgeableState)setPurgeableState:(MTLPurgeableState)state {
  return MTLPurgeableStateNonVolatile;
}
- (void)makeAliasable {
}
- (BOOL)isAliasable {
  return NO;
}
- (void)didModifyRange:(NSRange)range {
  if (range.location + range.length > self.length) {
    softmetal::misuse("-[MTLDebugBuffer didModifyRange:]",
                      "range(" + std::to_string(range.location) + ", " +
                          std::to_string(range.length) + ") exceeds the buffer's length(" +
                          std::to_string(self.length) + ").");
  }
}
- (void)addDebugMarker:(NSString*)marker range:(NSRange)range {
}
- (void)removeAllDebugMarkers {
}

@end

// --- Heaps: each buffer has memory of its own; the heap counts it ---

@implementation MTLHeapDescriptor

- (id)copyWithZone:(NSZone*)zone {
  MTLHeapDescriptor* copy = [[MTLHeapDescriptor alloc] init];
  copy.size = _size;
  copy.storageMode = _storageMode;
  copy.cpuCacheMode = _cpuCacheMode;
  copy.hazardTrackingMode = _hazardTrackingMode;
  copy.resourceOptions = _resourceOptions;
  copy.type = _type;
  return copy;
}

@end

@implementation SoftmetalHeap {
  SoftmetalDevice* _device;
  MTLHeapDescriptor* _descriptor;
  std::vector<std::weak_ptr<softmetal::Memory>> _buffers;
}
@synthesize label = _label;

- (instancetype)initWithDevice:(SoftmetalDevice*)device descriptor:(MTLHeapDescriptor*)descriptor {
  self = [super init];
  _device = device;
  _descriptor = [descriptor copy];
  return self;
}
- (id<MTLDevice>)device {
  return _device;
}
- (MTLStorageMode)storageMode {
  return _descriptor.storageMode;
}
- (MTLCPUCacheMode)cpuCacheMode {
  return _descriptor.cpuCacheMode;
}
- (MTLHazardTrackingMode)hazardTrackingMode {
  return _descriptor.hazardTrackingMode;
}
- (MTLResourceOptions)resourceOptions {
  return _descriptor.resourceOptions;
}
- (MTLHeapType)type {
  return _descriptor.type;
}
- (NSUInteger)size {
  return _descriptor.size;
}
- (NSUInteger)allocatedSize {
  return _descriptor.size;
}
- (NSUInteger)currentAllocatedSize {
  return _descriptor.size;
}
- (NSUInteger)usedSize {
  @synchronized(self) {
    NSUInteger used = 0;
    std::erase_if(_buffers, [](const auto& each) { return each.expired(); });
    for (const auto& each : _buffers) {
      if (auto memory = each.lock()) used += (memory->length() + 255) / 256 * 256;
    }
    return used;
  }
}
- (NSUInteger)maxAvailableSizeWithAlignment:(NSUInteger)alignment {
  const NSUInteger free = self.size - self.usedSize;
  return alignment ? free / alignment * alignment : free;
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
  @synchronized(self) {
    if (length == 0 || length > [self maxAvailableSizeWithAlignment:256]) return nil;
    auto memory = softmetal::Memory::allocate(_device, length);
    if (!memory) return nil;
    _buffers.push_back(memory);
    SoftmetalBuffer* buffer = [[SoftmetalBuffer alloc] initWithDevice:_device
                                                               memory:std::move(memory)
                                                              options:options];
    buffer.softmetal_heap = self;
    return buffer;
  }
}
- (MTLPurgeableState)setPurgeableState:(MTLPurgeableState)state {
  return MTLPurgeableStateNonVolatile;
}

@end

// --- Residency sets ---

@implementation MTLResidencySetDescriptor

- (id)copyWithZone:(NSZone*)zone {
  MTLResidencySetDescriptor* copy = [[MTLResidencySetDescriptor alloc] init];
  copy.label = _label;
  copy.initialCapacity = _initialCapacity;
  return copy;
}

@end

@implementation SoftmetalResidencySet {
  SoftmetalDevice* _device;
  NSString* _label;
  NSMutableArray<id<MTLAllocation>>* _members;
}

- (instancetype)initWithDevice:(SoftmetalDevice*)device
                    descriptor:(MTLResidencySetDescriptor*)descriptor {
  self = [super init];
  _device = device;
  _label = [descriptor.label copy];
  _members = [NSMutableArray array];
  return self;
}
- (id<MTLDevice>)device {
  return _device;
}
- (NSString*)label {
  return _label;
}
- (uint64_t)allocatedSize {
  uint64_t total = 0;
  for (id<MTLAllocation> each in self.allAllocations) total += each.allocatedSize;
  return total;
}
- (NSArray<id<MTLAllocation>>*)allAllocations {
  @synchronized(self) {
    return [_members copy];
  }
}
- (NSUInteger)allocationCount {
  return self.allAllocations.count;
}
- (void)requestResidency {
}
- (void)endResidency {
}
- (void)commit {
}
- (void)addAllocation:(id<MTLAllocation>)allocation {
  @synchronized(self) {
    if (![_members containsObject:allocation]) [_members addObject:allocation];
  }
}
- (void)addAllocations:(const id<MTLAllocation>[])allocations count:(NSUInteger)count {
  for (NSUInteger i = 0; i < count; ++i) [self addAllocation:allocations[i]];
}
- (void)removeAllocation:(id<MTLAllocation>)allocation {
  @synchronized(self) {
    [_members removeObject:allocation];
  }
}
- (void)removeAllocations:(const id<MTLAllocation>[])allocations count:(NSUInteger)count {
  for (NSUInteger i = 0; i < count; ++i) [self removeAllocation:allocations[i]];
}
- (void)removeAllAllocations {
  @synchronized(self) {
    [_members removeAllObjects];
  }
}
- (BOOL)containsAllocation:(id<MTLAllocation>)allocation {
  @synchronized(self) {
    return [_members containsObject:allocation];
  }
}

@end
