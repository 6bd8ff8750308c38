#include <algorithm>
#include <array>

#include "softmetal/device/device.h"
#include "softmetal/device/faults.h"
#include "softmetal/device/settings.h"

using softmetal::Argument;
using softmetal::ArgumentKind;
using softmetal::fault;
using softmetal::misuse;
using softmetal::Reference;

namespace {

constexpr NSUInteger kMaxBytes = 4096;
constexpr NSUInteger kThreadgroupMemoryAlignment = 16;

std::string text(NSUInteger x) { return "(" + std::to_string(x) + ")"; }

NSUInteger product(MTLSize size) { return size.width * size.height * size.depth; }

// What a dispatch runs with: a snapshot of the encoder's state.
struct Work {
  SoftmetalComputePipelineState* pipeline = nil;
  std::array<Reference, softmetal::kBufferSlots> buffers;
  std::array<uint32_t, softmetal::kThreadgroupSlots> threadgroup_bytes = {};
  MTLSize threads_per_threadgroup = {};
  MTLSize grid = {};
  bool grid_in_threads = false;
  Reference indirect;  // where set, the grid is read from it
};

NSError* run(const Work& work, double deadline) {
  const softmetal::Kernel& kernel = *work.pipeline.softmetal_kernel;
  const std::string name = kernel.name;
  softmetal::Dispatch dispatch;
  dispatch.kernel = &kernel;
  std::array<std::shared_ptr<void>, softmetal::kBufferSlots + 1> keep;
  for (uint32_t i = 0; i < softmetal::kBufferSlots; ++i) {
    const Reference& buffer = work.buffers[i];
    if (!buffer) continue;
    dispatch.buffers[i] = {buffer.address(keep[i]), buffer.length()};
    if (!dispatch.buffers[i].address) return buffer.used_after_release();
  }
  for (uint32_t i = 0; i < softmetal::kThreadgroupSlots; ++i) {
    dispatch.threadgroup_bytes[i] = work.threadgroup_bytes[i];
  }
  const MTLSize sizes[] = {work.threads_per_threadgroup, work.grid};
  uint32_t* to[] = {dispatch.threads_per_threadgroup, dispatch.grid};
  for (int i = 0; i < 2; ++i) {
    to[i][0] = static_cast<uint32_t>(sizes[i].width);
    to[i][1] = static_cast<uint32_t>(sizes[i].height);
    to[i][2] = static_cast<uint32_t>(sizes[i].depth);
  }
  if (work.indirect) {
    const char* from = work.indirect.address(keep[softmetal::kBufferSlots]);
    if (!from) return work.indirect.used_after_release();
    memcpy(dispatch.grid, from, sizeof dispatch.grid);
  }
  dispatch.grid_in_threads = work.grid_in_threads;
  if (dispatch.grid[0] > 1 && fault(softmetal::Fault::kLostThreadgroup)) --dispatch.grid[0];
  dispatch.seed = softmetal::seed();
  if (deadline != 0) dispatch.time_limit = std::max(deadline - softmetal::now(), 1e-3);
  const softmetal::DispatchResult result = softmetal::run(dispatch);
  softmetal::log_work(name, result.counters);
  if (result.ok) return nil;
  if (result.timed_out) {
    return softmetal::command_buffer_error(
        MTLCommandBufferErrorTimeout,
        "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout): " +
            result.message);
  }
  return softmetal::command_buffer_error(MTLCommandBufferErrorInternal,
                                         "Internal Error: " + result.message);
}

}  // namespace

@implementation SoftmetalComputeCommandEncoder {
  MTLDispatchType _dispatchType;
  Work _work;
}

- (instancetype)initWithCommandBuffer:(SoftmetalCommandBuffer*)commandBuffer
                         dispatchType:(MTLDispatchType)dispatchType {
  self = [super initWithCommandBuffer:commandBuffer
                               method:"-[MTLDebugCommandBuffer computeCommandEncoder]"];
  _dispatchType = dispatchType;
  return self;
}
- (MTLDispatchType)dispatchType {
  return _dispatchType;
}

- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  const char* method = "-[MTLDebugComputeCommandEncoder setComputePipelineState:]";
  [self softmetal_check:method];
  if (!state) misuse(method, "computePipelineState must not be nil.");
  _work.pipeline = static_cast<SoftmetalComputePipelineState*>(state);
}

// --- Arguments ---

- (void)softmetal_check:(const char*)method index:(NSUInteger)index {
  [self softmetal_check:method];
  if (index >= softmetal::kBufferSlots) {
    misuse(method, "index" + text(index) + " must be < 31.");
  }
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  const char* method = "-[MTLDebugComputeCommandEncoder setBytes:length:atIndex:]";
  [self softmetal_check:method index:index];
  if (!bytes) misuse(method, "bytes must not be nil.");
  if (length == 0 || length > kMaxBytes) {
    misuse(method, "length" + text(length) + " must be > 0 and <= 4096.");
  }
  _work.buffers[index] = Reference(bytes, length);
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  const char* method = "-[MTLDebugComputeCommandEncoder setBuffer:offset:atIndex:]";
  [self softmetal_check:method index:index];
  if (!buffer) {
    _work.buffers[index] = Reference();
    return;
  }
  if (offset >= buffer.length) {
    misuse(method,
           "offset" + text(offset) + " must be < [buffer length]" + text(buffer.length) + ".");
  }
  _work.buffers[index] = Reference(static_cast<SoftmetalBuffer*>(buffer), offset,
                                   self.softmetal_commandBuffer.retainedReferences);
}
- (void)setBufferOffset:(NSUInteger)offset atIndex:(NSUInteger)index {
  const char* method = "-[MTLDebugComputeCommandEncoder setBufferOffset:atIndex:]";
  [self softmetal_check:method index:index];
  const Reference& bound = _work.buffers[index];
  if (!bound || bound.is_bytes()) {
    misuse(method, "no buffer is set at index" + text(index) + ".");
  }
  const NSUInteger length = bound.offset() + bound.length();
  if (offset >= length) {
    misuse(method, "offset" + text(offset) + " must be < [buffer length]" + text(length) + ".");
  }
  _work.buffers[index] = bound.at(offset);
}
- (void)setBuffers:(const id<MTLBuffer>[])buffers
           offsets:(const NSUInteger[])offsets
         withRange:(NSRange)range {
  for (NSUInteger i = 0; i < range.length; ++i) {
    [self setBuffer:buffers[i] offset:offsets[i] atIndex:range.location + i];
  }
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  const char* method = "-[MTLDebugComputeCommandEncoder setThreadgroupMemoryLength:atIndex:]";
  [self softmetal_check:method index:index];
  if (length % kThreadgroupMemoryAlignment != 0) {
    misuse(method, "length" + text(length) + " must be a multiple of 16 bytes.");
  }
  if (length > softmetal::kThreadgroupMemoryLimit) {
    misuse(method, "length" + text(length) + " must be <= 32768.");
  }
  _work.threadgroup_bytes[index] = static_cast<uint32_t>(length);
}

// --- Dispatches ---

- (void)softmetal_checkThreadgroup:(MTLSize)size method:(const char*)method {
  const NSUInteger limit = _work.pipeline.maxTotalThreadsPerThreadgroup;
  const std::string sizes = "(threadsPerThreadgroup.width" + text(size.width) +
                            " * threadsPerThreadgroup.height" + text(size.height) +
                            " * threadsPerThreadgroup.depth" + text(size.depth) + ")" +
                            text(product(size));
  const NSUInteger device_limit = softmetal::kMaxThreadsPerThreadgroup;
  if (std::max({size.width, size.height, size.depth}) > device_limit ||
      product(size) > device_limit) {
    misuse(method, sizes + " must be <= 1024. (device threadgroup size limit)");
  }
  if (product(size) == 0) misuse(method, sizes + " must be > 0.");
  if (product(size) > limit) {
    misuse(method,
           sizes + " must be <= " + std::to_string(limit) + ". (kernel threadgroup size limit)");
  }
}
- (void)softmetal_checkArgument:(const Argument&)argument method:(const char*)method {
  const std::string function =
      "Compute Function(" + std::string(_work.pipeline.softmetal_kernel->name) + "): ";
  const std::string index = std::to_string(argument.index);
  const Reference& bound = _work.buffers[argument.index];
  if (!bound) {
    misuse(method, function + "missing buffer binding at index " + index + " for " + argument.name +
                       "[0].");
  }
  if (argument.is_writable && bound.is_bytes()) {
    misuse(method, function + "Bytes are being bound at index " + index +
                       " to a shader argument with write access enabled.");
  }
  if (bound.length() < argument.element_size) {
    misuse(method, function + "argument " + argument.name + "[0] from buffer(" + index +
                       ") with offset" + text(bound.offset()) + " and length" +
                       text(bound.offset() + bound.length()) + " has space for " +
                       std::to_string(bound.length()) + " bytes, but argument has a length" +
                       text(argument.element_size) + ".");
  }
  const NSUInteger alignment = std::max<NSUInteger>(argument.element_alignment, 1);
  if (bound.offset() % alignment != 0) {
    misuse(method, function + "the offset into the buffer " + argument.name +
                       " that is bound at buffer index " + index + " must be a multiple of " +
                       std::to_string(alignment) + " but was set to " +
                       std::to_string(bound.offset()) + ".");
  }
}
// All that Metal's debug layer says of a dispatch before it runs.
- (void)softmetal_dispatch:(const char*)method
     threadsPerThreadgroup:(MTLSize)threadsPerThreadgroup
                      grid:(MTLSize)grid
             gridInThreads:(bool)gridInThreads
                  indirect:(Reference)indirect {
  [self softmetal_check:method];
  if (!_work.pipeline) {
    misuse(method, "No compute pipeline state is set: call setComputePipelineState: before.");
  }
  [self softmetal_checkThreadgroup:threadsPerThreadgroup method:method];
  if (std::max({grid.width, grid.height, grid.depth}) > UINT32_MAX) {
    misuse(method, "grid size" + text(grid.width) + text(grid.height) + text(grid.depth) +
                       " must be < 2^32.");
  }
  const softmetal::Kernel& kernel = *_work.pipeline.softmetal_kernel;
  uint64_t threadgroup_bytes = _work.pipeline.staticThreadgroupMemoryLength;
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const Argument& argument = kernel.arguments[i];
    if (argument.kind != ArgumentKind::kBuffer && argument.kind != ArgumentKind::kThreadgroup) {
      continue;
    }
    if (argument.is_enabled && !argument.is_enabled()) continue;
    // Threadgroup memory without a length is not a misuse: public kernels declare such arguments
    // and do not use them, which Apple's compiler sees. One that is used is an error when it runs.
    if (argument.kind == ArgumentKind::kThreadgroup) {
      threadgroup_bytes += _work.threadgroup_bytes[argument.index];
    } else {
      [self softmetal_checkArgument:argument method:method];
    }
  }
  if (threadgroup_bytes > softmetal::kThreadgroupMemoryLimit) {
    misuse(method, "Threadgroup memory size" + text(threadgroup_bytes) +
                       " must be <= 32768. (static and dynamic together)");
  }
  Work work = _work;
  work.threads_per_threadgroup = threadsPerThreadgroup;
  work.grid = grid;
  work.grid_in_threads = gridInThreads;
  work.indirect = std::move(indirect);
  [self softmetal_append:[work = std::move(work)](double deadline) { return run(work, deadline); }];
}
- (void)dispatchThreadgroups:(MTLSize)threadgroupsPerGrid
       threadsPerThreadgroup:(MTLSize)threadsPerThreadgroup {
  [self softmetal_dispatch:"-[MTLDebugComputeCommandEncoder "
                           "dispatchThreadgroups:threadsPerThreadgroup:]"
      threadsPerThreadgroup:threadsPerThreadgroup
                       grid:threadgroupsPerGrid
              gridInThreads:false
                   indirect:Reference()];
}
- (void)dispatchThreads:(MTLSize)threadsPerGrid
    threadsPerThreadgroup:(MTLSize)threadsPerThreadgroup {
  [self softmetal_dispatch:"-[MTLDebugComputeCommandEncoder "
                           "dispatchThreads:threadsPerThreadgroup:]"
      threadsPerThreadgroup:threadsPerThreadgroup
                       grid:threadsPerGrid
              gridInThreads:true
                   indirect:Reference()];
}
- (void)dispatchThreadgroupsWithIndirectBuffer:(id<MTLBuffer>)indirectBuffer
                          indirectBufferOffset:(NSUInteger)indirectBufferOffset
                         threadsPerThreadgroup:(MTLSize)threadsPerThreadgroup {
  const char* method =
      "-[MTLDebugComputeCommandEncoder "
      "dispatchThreadgroupsWithIndirectBuffer:indirectBufferOffset:threadsPerThreadgroup:]";
  constexpr NSUInteger size = sizeof(MTLDispatchThreadgroupsIndirectArguments);
  if (!indirectBuffer) misuse(method, "indirectBuffer must not be nil.");
  if (indirectBufferOffset % 4 != 0 || indirectBuffer.length < size ||
      indirectBufferOffset > indirectBuffer.length - size) {
    misuse(method, "indirectBufferOffset" + text(indirectBufferOffset) +
                       " must be a multiple of 4 with 12 bytes of [indirectBuffer length]" +
                       text(indirectBuffer.length) + " after it.");
  }
  [self softmetal_dispatch:method
      threadsPerThreadgroup:threadsPerThreadgroup
                       grid:MTLSizeMake(0, 0, 0)
              gridInThreads:false
                   indirect:Reference(static_cast<SoftmetalBuffer*>(indirectBuffer),
                                      indirectBufferOffset,
                                      self.softmetal_commandBuffer.retainedReferences)];
}

// --- Dependencies: memory is the same for all and always resident, commands run in order ---

- (void)updateFence:(id<MTLFence>)fence {
  [self softmetal_check:"-[MTLDebugComputeCommandEncoder updateFence:]"];
}
- (void)waitForFence:(id<MTLFence>)fence {
  [self softmetal_check:"-[MTLDebugComputeCommandEncoder waitForFence:]"];
}
- (void)useResource:(id<MTLResource>)resource usage:(MTLResourceUsage)usage {
  const char* method = "-[MTLDebugComputeCommandEncoder useResource:usage:]";
  [self softmetal_check:method];
  if (!resource) misuse(method, "resource must not be nil.");
}
- (void)useResources:(const id<MTLResource>[])resources
               count:(NSUInteger)count
               usage:(MTLResourceUsage)usage {
  for (NSUInteger i = 0; i < count; ++i) [self useResource:resources[i] usage:usage];
}
- (void)useHeap:(id<MTLHeap>)heap {
  [self softmetal_check:"-[MTLDebugComputeCommandEncoder useHeap:]"];
}
- (void)useHeaps:(const id<MTLHeap>[])heaps count:(NSUInteger)count {
  [self softmetal_check:"-[MTLDebugComputeCommandEncoder useHeaps:count:]"];
}
- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
  [self softmetal_check:"-[MTLDebugComputeCommandEncoder memoryBarrierWithScope:]"];
}
- (void)memoryBarrierWithResources:(const id<MTLResource>[])resources count:(NSUInteger)count {
  [self softmetal_check:"-[MTLDebugComputeCommandEncoder memoryBarrierWithResources:count:]"];
}

@end
