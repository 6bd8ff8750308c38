#include <unistd.h>

#include "softmetal/device/device.h"
#include "softmetal/device/faults.h"
#include "softmetal/device/settings.h"

using softmetal::Fault;
using softmetal::fault;
using softmetal::misuse;

NSErrorDomain const MTLCommandBufferErrorDomain = @"MTLCommandBufferErrorDomain";
NSErrorUserInfoKey const MTLCommandBufferEncoderInfoErrorKey =
    @"MTLCommandBufferEncoderInfoErrorKey";

namespace softmetal {

NSError* command_buffer_error(MTLCommandBufferError code, const std::string& what) {
  return make_error(MTLCommandBufferErrorDomain, static_cast<NSInteger>(code), what);
}

namespace {

constexpr useconds_t kSlowCompletion = 200000;

// Faults that end a command buffer before its first command, in the words of Apple's driver.
NSError* injected_error() {
  if (fault(Fault::kCommandBufferError)) {
    return command_buffer_error(MTLCommandBufferErrorInternal,
                                "Internal Error (0000000e:Internal Error), injected");
  }
  if (fault(Fault::kCommandBufferMemory)) {
    return command_buffer_error(MTLCommandBufferErrorOutOfMemory,
                                "Insufficient Memory (00000008:"
                                "kIOGPUCommandBufferCallbackErrorOutOfMemory), injected");
  }
  if (fault(Fault::kWatchdog)) {
    return command_buffer_error(MTLCommandBufferErrorTimeout,
                                "Caused GPU Timeout Error (00000002:"
                                "kIOGPUCommandBufferCallbackErrorTimeout), injected");
  }
  return nil;
}

}  // namespace
}  // namespace softmetal

@implementation MTLCommandBufferDescriptor

- (instancetype)init {
  self = [super init];
  _retainedReferences = YES;
  return self;
}
- (id)copyWithZone:(NSZone*)zone {
  MTLCommandBufferDescriptor* copy = [[MTLCommandBufferDescriptor alloc] init];
  copy.retainedReferences = _retainedReferences;
  copy.errorOptions = _errorOptions;
  return copy;
}

@end

@implementation MTLComputePassDescriptor

+ (MTLComputePassDescriptor*)computePassDescriptor {
  return [[self alloc] init];
}
- (id)copyWithZone:(NSZone*)zone {
  MTLComputePassDescriptor* copy = [[MTLComputePassDescriptor alloc] init];
  copy.dispatchType = _dispatchType;
  return copy;
}

@end

@implementation MTLBlitPassDescriptor

+ (MTLBlitPassDescriptor*)blitPassDescriptor {
  return [[self alloc] init];
}
- (id)copyWithZone:(NSZone*)zone {
  return [[MTLBlitPassDescriptor alloc] init];
}

@end

@interface SoftmetalEncoderInfo : NSObject <MTLCommandBufferEncoderInfo>
- (instancetype)initWithPass:(const softmetal::Pass&)pass state:(MTLCommandEncoderErrorState)state;
@end

@implementation SoftmetalEncoderInfo

@synthesize label = _label, debugSignposts = _debugSignposts, errorState = _errorState;

- (instancetype)initWithPass:(const softmetal::Pass&)pass state:(MTLCommandEncoderErrorState)state {
  self = [super init];
  _label = pass.label ? pass.label : @"";
  _debugSignposts = [pass.signposts copy];
  _errorState = state;
  return self;
}
- (NSString*)description {
  return [NSString stringWithFormat:@"<MTLCommandBufferEncoderInfo \"%@\" state %ld>", _label,
                                    static_cast<long>(_errorState)];
}

@end

@implementation SoftmetalCommandBuffer {
  SoftmetalCommandQueue* _queue;
  BOOL _retainedReferences;
  MTLCommandBufferErrorOption _errorOptions;
  std::shared_ptr<softmetal::Timeline::Place> _place;
  std::vector<std::shared_ptr<softmetal::Pass>> _passes;
  BOOL _hasOpenEncoder;
  NSUInteger _debugGroups;

  std::mutex _mutex;  // of what follows, and of _place's being set
  std::condition_variable _changed;
  MTLCommandBufferStatus _status;
  BOOL _isFinished;  // the completed handlers have run
  NSError* _error;
  NSMutableArray<MTLCommandBufferHandler>*_scheduledHandlers, *_completedHandlers;
  double _kernelStartTime, _kernelEndTime, _GPUStartTime, _GPUEndTime;
}
@synthesize label = _label;

- (instancetype)initWithQueue:(SoftmetalCommandQueue*)queue
           retainedReferences:(BOOL)retainedReferences
                 errorOptions:(MTLCommandBufferErrorOption)errorOptions {
  self = [super init];
  _queue = queue;
  _retainedReferences = retainedReferences;
  _errorOptions = errorOptions;
  _scheduledHandlers = [NSMutableArray array];
  _completedHandlers = [NSMutableArray array];
  queue.softmetal_timeline->acquire();
  return self;
}
- (void)dealloc {
  if (_isFinished) return;
  if (_place) _queue.softmetal_timeline->abandon(*_place);
  _queue.softmetal_timeline->release();
}
- (id<MTLDevice>)device {
  return _queue.device;
}
- (id<MTLCommandQueue>)commandQueue {
  return _queue;
}
- (BOOL)retainedReferences {
  return _retainedReferences;
}
- (MTLCommandBufferErrorOption)errorOptions {
  return _errorOptions;
}
- (MTLCommandBufferStatus)status {
  const std::lock_guard lock(_mutex);
  return _status;
}
- (NSError*)error {
  const std::lock_guard lock(_mutex);
  return _error;
}
- (CFTimeInterval)kernelStartTime {
  const std::lock_guard lock(_mutex);
  return _kernelStartTime;
}
- (CFTimeInterval)kernelEndTime {
  const std::lock_guard lock(_mutex);
  return _kernelEndTime;
}
- (CFTimeInterval)GPUStartTime {
  const std::lock_guard lock(_mutex);
  return _GPUStartTime;
}
- (CFTimeInterval)GPUEndTime {
  const std::lock_guard lock(_mutex);
  return _GPUEndTime;
}

// --- Encoding ---

- (void)softmetal_checkEncodable:(const char*)method {
  if (self.status >= MTLCommandBufferStatusCommitted) {
    misuse(method, "encoding to a committed command buffer.");
  }
  if (_hasOpenEncoder) {
    misuse(method, "A command encoder is already encoding to this command buffer");
  }
}
- (std::shared_ptr<softmetal::Pass>)softmetal_beginEncoding:(const char*)method {
  [self softmetal_checkEncodable:method];
  _hasOpenEncoder = YES;
  auto pass = std::make_shared<softmetal::Pass>();
  pass->signposts = [NSMutableArray array];
  _passes.push_back(pass);
  return pass;
}
- (void)softmetal_endEncoding {
  _hasOpenEncoder = NO;
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
  return [self computeCommandEncoderWithDispatchType:MTLDispatchTypeSerial];
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoderWithDispatchType:
    (MTLDispatchType)dispatchType {
  return [[SoftmetalComputeCommandEncoder alloc] initWithCommandBuffer:self
                                                          dispatchType:dispatchType];
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoderWithDescriptor:
    (MTLComputePassDescriptor*)descriptor {
  return [self computeCommandEncoderWithDispatchType:descriptor.dispatchType];
}
- (id<MTLBlitCommandEncoder>)blitCommandEncoder {
  return [[SoftmetalBlitCommandEncoder alloc] initWithCommandBuffer:self];
}
- (id<MTLBlitCommandEncoder>)blitCommandEncoderWithDescriptor:(MTLBlitPassDescriptor*)descriptor {
  return [self blitCommandEncoder];
}
- (void)softmetal_appendEvent:(std::function<NSError*(double)>)command method:(const char*)method {
  [self softmetal_beginEncoding:method]->commands.push_back(std::move(command));
  [self softmetal_endEncoding];
}
- (void)encodeSignalEvent:(id<MTLEvent>)event value:(uint64_t)value {
  const char* method = "-[MTLDebugCommandBuffer encodeSignalEvent:value:]";
  if (!event) misuse(method, "event must not be nil.");
  SoftmetalEvent* own = static_cast<SoftmetalEvent*>(event);
  [self softmetal_appendEvent:[own, value](double) -> NSError* {
    own.signaledValue = value;
    return nil;
  }
                       method:method];
}
- (void)encodeWaitForEvent:(id<MTLEvent>)event value:(uint64_t)value {
  const char* method = "-[MTLDebugCommandBuffer encodeWaitForEvent:value:]";
  if (!event) misuse(method, "event must not be nil.");
  SoftmetalEvent* own = static_cast<SoftmetalEvent*>(event);
  [self softmetal_appendEvent:[own, value](double deadline) -> NSError* {
    const double left = deadline - softmetal::now();
    const uint64_t limit = deadline == 0 ? UINT64_MAX : left > 0 ? uint64_t(left * 1000) : 0;
    if ([own waitUntilSignaledValue:value timeoutMS:limit]) return nil;
    return softmetal::command_buffer_error(
        MTLCommandBufferErrorTimeout, "Caused GPU Timeout Error: value " + std::to_string(value) +
                                          " of an event was not signaled");
  }
                       method:method];
}
- (void)pushDebugGroup:(NSString*)string {
  ++_debugGroups;
}
- (void)popDebugGroup {
  if (_debugGroups == 0) {
    misuse("-[MTLDebugCommandBuffer popDebugGroup]", "popDebugGroup without pushDebugGroup.");
  }
  --_debugGroups;
}
// All memory of this device is resident, always.
- (void)useResidencySet:(id<MTLResidencySet>)residencySet {
}
- (void)useResidencySets:(const id<MTLResidencySet>[])residencySets count:(NSUInteger)count {
}

// --- Execution ---

- (void)enqueue {
  const std::lock_guard lock(_mutex);
  if (_status != MTLCommandBufferStatusNotEnqueued) {
    misuse("-[MTLDebugCommandBuffer enqueue]", _status == MTLCommandBufferStatusEnqueued
                                                   ? "enqueue an already enqueued command buffer"
                                                   : "enqueue a committed command buffer");
  }
  _place = _queue.softmetal_timeline->enqueue();
  _status = MTLCommandBufferStatusEnqueued;
}
- (void)commit {
  const char* method = "-[MTLDebugCommandBuffer commit]";
  if (_hasOpenEncoder) misuse(method, "commit command buffer with uncommitted encoder");
  {
    const std::lock_guard lock(_mutex);
    if (_status >= MTLCommandBufferStatusCommitted) {
      misuse(method, "commit an already committed command buffer");
    }
    if (!_place) _place = _queue.softmetal_timeline->enqueue();
    _status = MTLCommandBufferStatusCommitted;
    _kernelStartTime = softmetal::now();
  }
  _queue.softmetal_timeline->commit(*_place, self);
}
- (void)softmetal_addHandler:(MTLCommandBufferHandler)handler
                          to:(NSMutableArray<MTLCommandBufferHandler>*)handlers
                        name:(const char*)name {
  const std::string method = std::string("-[MTLDebugCommandBuffer add") + name + "Handler:]";
  if (!handler) misuse(method.c_str(), "block must not be nil.");
  const std::lock_guard lock(_mutex);
  if (_status >= MTLCommandBufferStatusCommitted) {
    misuse(method.c_str(), std::string(name) + " handler provided after commit call");
  }
  [handlers addObject:[handler copy]];
}
- (void)addScheduledHandler:(MTLCommandBufferHandler)handler {
  [self softmetal_addHandler:handler to:_scheduledHandlers name:"Scheduled"];
}
- (void)addCompletedHandler:(MTLCommandBufferHandler)handler {
  [self softmetal_addHandler:handler to:_completedHandlers name:"Completed"];
}
- (void)softmetal_checkCommitted:(const char*)method {
  if (self.status < MTLCommandBufferStatusCommitted) {
    misuse(method, "the command buffer has not been committed: this would wait for ever");
  }
}
- (void)waitUntilScheduled {
  [self softmetal_checkCommitted:"-[MTLDebugCommandBuffer waitUntilScheduled]"];
  std::unique_lock lock(_mutex);
  _changed.wait(lock, [&] { return _status >= MTLCommandBufferStatusScheduled; });
}
- (void)waitUntilCompleted {
  [self softmetal_checkCommitted:"-[MTLDebugCommandBuffer waitUntilCompleted]"];
  std::unique_lock lock(_mutex);
  _changed.wait(lock, [&] { return _isFinished; });
}

- (NSError*)softmetal_runPasses {
  if (NSError* error = softmetal::injected_error()) return error;
  if (fault(Fault::kHang)) {
    for (;;) pause();
  }
  softmetal::begin_command_buffer();
  const double limit = softmetal::time_limit();
  const double deadline = limit > 0 ? softmetal::now() + limit : 0;
  for (size_t i = 0; i < _passes.size(); ++i) {
    for (const auto& command : _passes[i]->commands) {
      if (NSError* error = command(deadline)) return [self softmetal_describe:error at:i];
    }
  }
  return nil;
}
// Adds what each encoder came to, where the command buffer was asked for it.
- (NSError*)softmetal_describe:(NSError*)error at:(size_t)faulted {
  if (!(_errorOptions & MTLCommandBufferErrorOptionEncoderExecutionStatus)) return error;
  NSMutableArray* infos = [NSMutableArray array];
  for (size_t i = 0; i < _passes.size(); ++i) {
    const MTLCommandEncoderErrorState state = i < faulted    ? MTLCommandEncoderErrorStateCompleted
                                              : i == faulted ? MTLCommandEncoderErrorStateFaulted
                                                             : MTLCommandEncoderErrorStatePending;
    [infos addObject:[[SoftmetalEncoderInfo alloc] initWithPass:*_passes[i] state:state]];
  }
  return [NSError errorWithDomain:error.domain
                             code:error.code
                         userInfo:@{
                           NSLocalizedDescriptionKey : error.localizedDescription,
                           MTLCommandBufferEncoderInfoErrorKey : infos,
                         }];
}
- (void)softmetal_execute {
  {
    const std::lock_guard lock(_mutex);
    _status = MTLCommandBufferStatusScheduled;
    _kernelEndTime = softmetal::now();
    _changed.notify_all();
  }
  for (MTLCommandBufferHandler handler in _scheduledHandlers) handler(self);
  const double start = softmetal::now();
  NSError* error = [self softmetal_runPasses];
  if (fault(Fault::kSlowCompletion)) usleep(softmetal::kSlowCompletion);
  // What was used is let go before anybody hears of the end.
  _passes.clear();
  {
    const std::lock_guard lock(_mutex);
    _GPUStartTime = start;
    _GPUEndTime = softmetal::now();
    _error = error;
    _status = error ? MTLCommandBufferStatusError : MTLCommandBufferStatusCompleted;
  }
  for (MTLCommandBufferHandler handler in _completedHandlers) handler(self);
  [_scheduledHandlers removeAllObjects];
  [_completedHandlers removeAllObjects];
  _queue.softmetal_timeline->release();
  const std::lock_guard lock(_mutex);
  _isFinished = YES;
  _changed.notify_all();
}

@end
