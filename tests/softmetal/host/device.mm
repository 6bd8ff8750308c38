#include "check.h"

#include <unistd.h>

#include <cstdlib>

#include "softmetal/softmetal.h"

TEST(identity) {
  CHECK(device());
  CHECK([device().name isEqualToString:@"Software Metal"]);
  NSArray<id<MTLDevice>>* all = MTLCopyAllDevices();
  CHECK(all.count == 1 && all[0] == device());
  CHECK(device().registryID != 0);
  CHECK(device().hasUnifiedMemory && device().isHeadless && !device().isRemovable);
}

TEST(families) {
  CHECK([device() supportsFamily:MTLGPUFamilyApple7]);
  CHECK([device() supportsFamily:MTLGPUFamilyMetal3]);
  CHECK([device() supportsFamily:MTLGPUFamilyCommon3]);
  CHECK(![device() supportsFamily:static_cast<MTLGPUFamily>(1999)]);
}

TEST(limits) {
  CHECK(device().maxThreadgroupMemoryLength == 32768);
  const MTLSize most = device().maxThreadsPerThreadgroup;
  CHECK(most.width == 1024 && most.height == 1024 && most.depth == 1024);
  CHECK(device().maxBufferLength >= 1ul << 30);
  CHECK(device().recommendedMaxWorkingSetSize > 1ul << 28);
}

TEST(shared_buffer) {
  id<MTLBuffer> buffer = [device() newBufferWithLength:100 options:MTLResourceStorageModeShared];
  CHECK(buffer.length == 100 && buffer.storageMode == MTLStorageModeShared);
  CHECK(buffer.device == device());
  CHECK(reinterpret_cast<uintptr_t>(buffer.contents) % 4096 == 0);
  for (int i = 0; i < 100; ++i) CHECK(static_cast<char*>(buffer.contents)[i] == 0);
  buffer.label = @"weights";
  CHECK([buffer.label isEqualToString:@"weights"]);
}

TEST(private_buffer_has_no_contents) {
  id<MTLBuffer> buffer = [device() newBufferWithLength:64 options:MTLResourceStorageModePrivate];
  CHECK(buffer.storageMode == MTLStorageModePrivate && !buffer.contents);
}

TEST(buffer_copies_bytes) {
  float values[3] = {1, 2, 3};
  id<MTLBuffer> buffer = [device() newBufferWithBytes:values
                                               length:sizeof values
                                              options:MTLResourceStorageModeShared];
  values[1] = 9;
  CHECK(contents(buffer)[0] == 1 && contents(buffer)[1] == 2 && contents(buffer)[2] == 3);
}

TEST(no_copy_buffer) {
  void* memory = nullptr;
  CHECK(posix_memalign(&memory, 4096, 8192) == 0);
  __block int calls = 0;
  @autoreleasepool {
    id<MTLBuffer> buffer = [device() newBufferWithBytesNoCopy:memory
                                                       length:8192
                                                      options:MTLResourceStorageModeShared
                                                  deallocator:^(void* pointer, NSUInteger length) {
                                                    CHECK(pointer == memory && length == 8192);
                                                    ++calls;
                                                  }];
    CHECK(buffer.contents == memory);
    static_cast<float*>(memory)[5] = 3;
    id<MTLCommandBuffer> commands = [[device() newCommandQueue] commandBuffer];
    encode(commands, @"twice", buffer, 16);
    [commands commit];
    [commands waitUntilCompleted];
    CHECK(static_cast<float*>(memory)[5] == 6);
    CHECK(calls == 0);
  }
  CHECK(calls == 1);
  free(memory);
}

// The command buffer keeps what it uses until it has run.
TEST(no_copy_buffer_in_flight) {
  void* memory = nullptr;
  CHECK(posix_memalign(&memory, 4096, 4096) == 0);
  static_cast<float*>(memory)[3] = 5;
  __block float last = 0;
  id<MTLCommandBuffer> commands;
  @autoreleasepool {
    id<MTLBuffer> buffer = [device() newBufferWithBytesNoCopy:memory
                                                       length:4096
                                                      options:MTLResourceStorageModeShared
                                                  deallocator:^(void* pointer, NSUInteger) {
                                                    last = static_cast<float*>(pointer)[3];
                                                  }];
    commands = [[device() newCommandQueue] commandBuffer];
    encode(commands, @"twice", buffer, 16);
    buffer = nil;
  }
  CHECK(last == 0);
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(last == 10);
  free(memory);
}

TEST(allocated_size) {
  const NSUInteger before = device().currentAllocatedSize;
  @autoreleasepool {
    id<MTLBuffer> buffer = [device() newBufferWithLength:12345
                                                 options:MTLResourceStorageModeShared];
    CHECK(device().currentAllocatedSize == before + buffer.allocatedSize);
  }
  CHECK(device().currentAllocatedSize == before);
}

TEST(heap) {
  MTLHeapDescriptor* descriptor = [[MTLHeapDescriptor alloc] init];
  descriptor.size = 1024;
  descriptor.storageMode = MTLStorageModeShared;
  id<MTLHeap> heap = [device() newHeapWithDescriptor:descriptor];
  CHECK(heap.size == 1024 && heap.usedSize == 0);
  @autoreleasepool {
    id<MTLBuffer> first = [heap newBufferWithLength:600 options:MTLResourceStorageModeShared];
    CHECK(first && first.heap == heap && heap.usedSize == 768);
    CHECK(![heap newBufferWithLength:600 options:MTLResourceStorageModeShared]);
    CHECK([heap maxAvailableSizeWithAlignment:256] == 256);
  }
  CHECK(heap.usedSize == 0);
  const MTLSizeAndAlign size =
      [device() heapBufferSizeAndAlignWithLength:600 options:MTLResourceStorageModeShared];
  CHECK(size.size == 768 && size.align == 256);
}

TEST(residency_set) {
  NSError* error = nil;
  id<MTLResidencySet> set =
      [device() newResidencySetWithDescriptor:[[MTLResidencySetDescriptor alloc] init]
                                        error:&error];
  id<MTLBuffer> buffer = floats({1, 2, 3, 4});
  [set addAllocation:buffer];
  [set addAllocation:buffer];
  CHECK(set.allocationCount == 1 && [set containsAllocation:buffer]);
  CHECK(set.allocatedSize == buffer.allocatedSize);
  [set removeAllocation:buffer];
  CHECK(set.allocationCount == 0);
}

TEST(capture_is_refused) {
  MTLCaptureDescriptor* descriptor = [[MTLCaptureDescriptor alloc] init];
  descriptor.captureObject = device();
  NSError* error = nil;
  CHECK(![[MTLCaptureManager sharedCaptureManager] startCaptureWithDescriptor:descriptor
                                                                        error:&error]);
  CHECK(error);
}

// --- Faults ---

TEST(fault_nil_device) {
  CHECK(softmetal_inject_fault("nil_device", 1));
  CHECK(!MTLCreateSystemDefaultDevice());
  CHECK(MTLCreateSystemDefaultDevice());
}

TEST(fault_old_family) {
  CHECK(softmetal_inject_fault("old_family", -1));
  CHECK(![device() supportsFamily:MTLGPUFamilyApple7]);
  CHECK(![device() supportsFamily:MTLGPUFamilyMetal3]);
  softmetal_clear_faults();
  CHECK([device() supportsFamily:MTLGPUFamilyApple7]);
}

TEST(fault_out_of_memory) {
  CHECK(softmetal_inject_fault("out_of_memory", 1));
  CHECK(![device() newBufferWithLength:64 options:MTLResourceStorageModeShared]);
  CHECK([device() newBufferWithLength:64 options:MTLResourceStorageModeShared]);
}

TEST(fault_no_copy_refused) {
  const auto page = static_cast<size_t>(getpagesize());
  void* memory = aligned_alloc(page, page);
  const auto lend = [&] {
    return [device() newBufferWithBytesNoCopy:memory
                                       length:page
                                      options:MTLResourceStorageModeShared
                                  deallocator:nil];
  };
  CHECK(softmetal_inject_fault("no_copy_refused", 1));
  CHECK([device() newBufferWithLength:64 options:MTLResourceStorageModeShared]);
  CHECK(!lend());
  CHECK(lend());
  free(memory);
}

TEST(fault_of_no_such_name) { CHECK(!softmetal_inject_fault("no_such_fault", 1)); }

int main(int argc, const char** argv) { return run_tests(argc, argv); }
