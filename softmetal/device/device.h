// Shared by the classes that stand for Metal's.
#pragma once

#import <Metal/Metal.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "softmetal/executor.h"
#include "softmetal/foundation/internal.h"

@class SoftmetalDevice, SoftmetalBuffer, SoftmetalLibrary, SoftmetalFunction,
    SoftmetalComputePipelineState, SoftmetalCommandQueue, SoftmetalCommandBuffer;

namespace softmetal {

// A misuse of the interface: ends the program with the message, as Metal does under its debug
// layer. With SOFTMETAL_VALIDATION=error it raises an NSException instead.
[[noreturn]] void misuse(const char* method, const std::string& what);
bool misuse_was_raised();

// Raw memory of buffers, in whole pages; exact in length, so that AddressSanitizer sees a step past
// the end.
class Memory {
 public:
  // Null where there is no room.
  static std::shared_ptr<Memory> allocate(SoftmetalDevice* device, size_t length);
  // The caller's, given back by `deallocator`.
  static std::shared_ptr<Memory> wrap(void* address, size_t length,
                                      void (^deallocator)(void* pointer, NSUInteger length));
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* address() const { return address_; }
  size_t length() const { return length_; }

 private:
  Memory() = default;
  char* address_ = nullptr;
  size_t length_ = 0;
  SoftmetalDevice* device_ = nil;  // null where it is not the device's memory
  void (^deallocator_)(void*, NSUInteger) = nil;
};

// The bytes of a function constant, and what is known of its type.
struct ConstantValue {
  FunctionConstantValue value;
  MTLDataType type = MTLDataTypeNone;
};

MTLDataType data_type(const std::string& type_name);  // MTLDataTypeNone: not one of Metal's
size_t size_of(MTLDataType type);                     // 0: not a scalar or vector

double now();  // seconds, of a clock that never steps back

}  // namespace softmetal

@interface SoftmetalDevice : NSObject <MTLDevice>
// Counts bytes of buffers. False where there would be more than the device has.
- (BOOL)softmetal_reserve:(size_t)bytes;
- (void)softmetal_release:(size_t)bytes;
@end

@interface SoftmetalBuffer : NSObject <MTLBuffer>
- (instancetype)initWithDevice:(SoftmetalDevice*)device
                        memory:(std::shared_ptr<softmetal::Memory>)memory
                       options:(MTLResourceOptions)options;
@property(readonly) std::shared_ptr<softmetal::Memory> softmetal_memory;
@property(nonatomic) id<MTLHeap> softmetal_heap;
@end

@interface SoftmetalLibrary : NSObject <MTLLibrary>
// Nil and an error where `path` is no image.
- (instancetype)initWithDevice:(SoftmetalDevice*)device path:(NSString*)path error:(NSError**)error;
@property(readonly) NSString* softmetal_path;
// Opened without constants; kernels that take none run from it.
@property(readonly) std::shared_ptr<softmetal::Image> softmetal_image;
@property(nonatomic) BOOL softmetal_isTemporary;  // the file goes with the library
@end

namespace softmetal {

// Nil and an error where the text or the bytes are none.
SoftmetalLibrary* library_from_source(SoftmetalDevice* device, NSString* source,
                                      MTLCompileOptions* options, NSError** error);
SoftmetalLibrary* library_from_data(SoftmetalDevice* device, dispatch_data_t data, NSError** error);

}  // namespace softmetal

@interface SoftmetalFunction : NSObject <MTLFunction>
- (instancetype)initWithLibrary:(SoftmetalLibrary*)library
                           name:(NSString*)name
                      constants:(std::vector<softmetal::FunctionConstantValue>)constants
                     dictionary:(NSDictionary<NSString*, MTLFunctionConstant*>*)dictionary;
@property(readonly) NSString* softmetal_kernelName;
@property(readonly) SoftmetalLibrary* softmetal_library;
@property(readonly) const std::vector<softmetal::FunctionConstantValue>& softmetal_constants;
// The same for the same kernel with the same constants.
@property(readonly) NSString* softmetal_key;
@property(nonatomic, copy) NSString* softmetal_specializedName;
@end

@interface MTLFunctionConstant ()
- (instancetype)initWithConstant:(const softmetal::FunctionConstant&)constant;
@end

@interface MTLFunctionConstantValues ()
@property(readonly) const std::vector<softmetal::ConstantValue>& softmetal_values;
@end

@interface SoftmetalComputePipelineState : NSObject <MTLComputePipelineState>
+ (instancetype)stateWithDevice:(SoftmetalDevice*)device
                     descriptor:(MTLComputePipelineDescriptor*)descriptor
                        options:(MTLPipelineOption)options
                          error:(NSError**)error;
@property(readonly) const softmetal::Kernel* softmetal_kernel;
@end

@interface SoftmetalBinaryArchive : NSObject <MTLBinaryArchive>
- (instancetype)initWithDevice:(SoftmetalDevice*)device
                    descriptor:(MTLBinaryArchiveDescriptor*)descriptor
                         error:(NSError**)error;
- (BOOL)softmetal_contains:(NSString*)key;
@end

@interface SoftmetalEvent : NSObject <MTLSharedEvent>
- (instancetype)initWithDevice:(SoftmetalDevice*)device;
@end

@interface SoftmetalFence : NSObject <MTLFence>
- (instancetype)initWithDevice:(SoftmetalDevice*)device;
@end

@interface SoftmetalHeap : NSObject <MTLHeap>
- (instancetype)initWithDevice:(SoftmetalDevice*)device descriptor:(MTLHeapDescriptor*)descriptor;
@end

@interface SoftmetalResidencySet : NSObject <MTLResidencySet>
- (instancetype)initWithDevice:(SoftmetalDevice*)device
                    descriptor:(MTLResidencySetDescriptor*)descriptor;
@end

namespace softmetal {

// The work of one encoder. Commands run one after another; one returns nil or what went wrong, and
// gives up at `deadline` (of now(); 0: never).
struct Pass {
  NSString* label = nil;
  NSMutableArray<NSString*>* signposts = nil;
  std::vector<std::function<NSError*(double deadline)>> commands;
};

// The order in which the command buffers of a queue run. Shared by the queue and its thread, which
// may outlive the queue for a moment.
class Timeline : public std::enable_shared_from_this<Timeline> {
 public:
  // The place of a command buffer, which is held from when it is committed until it has run.
  struct Place {
    SoftmetalCommandBuffer* command_buffer = nil;
    bool is_abandoned = false;
  };

  explicit Timeline(size_t maximum) : maximum_(maximum) {}
  void start();  // the thread
  void close();  // the thread ends after what was committed

  // Waits while as many command buffers as the queue may have are not yet done.
  void acquire();
  void release();

  std::shared_ptr<Place> enqueue();
  void commit(Place& place, SoftmetalCommandBuffer* command_buffer);
  void abandon(Place& place);

 private:
  void work();

  const size_t maximum_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Place>> places_;
  size_t count_ = 0;
  bool is_closed_ = false;
};

NSError* command_buffer_error(MTLCommandBufferError code, const std::string& what);

}  // namespace softmetal

@interface SoftmetalCommandQueue : NSObject <MTLCommandQueue>
- (instancetype)initWithDevice:(SoftmetalDevice*)device maximum:(NSUInteger)maximum;
@property(readonly) std::shared_ptr<softmetal::Timeline> softmetal_timeline;
@end

@interface SoftmetalCommandBuffer : NSObject <MTLCommandBuffer>
- (instancetype)initWithQueue:(SoftmetalCommandQueue*)queue
           retainedReferences:(BOOL)retainedReferences
                 errorOptions:(MTLCommandBufferErrorOption)errorOptions;
// Between these two an encoder is open.
- (std::shared_ptr<softmetal::Pass>)softmetal_beginEncoding:(const char*)method;
- (void)softmetal_endEncoding;
// On the thread of the queue.
- (void)softmetal_execute;
@end

// What compute and blit encoders share.
@interface SoftmetalCommandEncoder : NSObject <MTLCommandEncoder>
- (instancetype)initWithCommandBuffer:(SoftmetalCommandBuffer*)commandBuffer
                               method:(const char*)method;
@property(readonly) SoftmetalCommandBuffer* softmetal_commandBuffer;
- (void)softmetal_append:(std::function<NSError*(double deadline)>)command;
- (void)softmetal_check:(const char*)method;  // that encoding has not ended
@end

@interface SoftmetalComputeCommandEncoder : SoftmetalCommandEncoder <MTLComputeCommandEncoder>
- (instancetype)initWithCommandBuffer:(SoftmetalCommandBuffer*)commandBuffer
                         dispatchType:(MTLDispatchType)dispatchType;
@end

@interface SoftmetalBlitCommandEncoder : SoftmetalCommandEncoder <MTLBlitCommandEncoder>
- (instancetype)initWithCommandBuffer:(SoftmetalCommandBuffer*)commandBuffer;
@end

namespace softmetal {

// Memory that a command reads or writes when it runs, kept alive till then unless the command
// buffer does not retain what it uses.
class Reference {
 public:
  Reference() = default;
  Reference(SoftmetalBuffer* buffer, size_t offset, bool is_retained);
  // A copy of the bytes, exact in length.
  Reference(const void* bytes, size_t length);

  explicit operator bool() const { return length_ != 0; }
  size_t offset() const { return offset_; }
  size_t length() const { return length_; }  // from the offset
  bool is_bytes() const { return is_bytes_; }
  // The same memory further on.
  Reference at(size_t offset) const;

  // Null where the buffer was released; `keep` holds it while the command runs.
  char* address(std::shared_ptr<void>& keep) const;
  NSError* used_after_release() const;

 private:
  std::weak_ptr<void> weak_;
  std::shared_ptr<void> strong_;
  char* address_ = nullptr;  // of the buffer's first byte
  size_t offset_ = 0, length_ = 0;
  bool is_bytes_ = false;
  NSString* label_ = nil;
};

}  // namespace softmetal
