#include "check.h"

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "softmetal/softmetal.h"

namespace {

id<MTLCommandQueue> queue() { return [device() newCommandQueue]; }

// A command buffer that runs until *stop is set, and the buffer that stops it.
id<MTLCommandBuffer> endless(id<MTLCommandQueue> on, id<MTLBuffer> stop) {
  id<MTLCommandBuffer> commands = [on commandBuffer];
  encode(commands, @"forever", stop, 2);
  return commands;
}
void set(id<MTLBuffer> stop) { reinterpret_cast<std::atomic<uint32_t>*>(stop.contents)->store(1); }

}  // namespace

TEST(status_and_times) {
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  CHECK(commands.status == MTLCommandBufferStatusNotEnqueued && commands.retainedReferences);
  encode(commands, @"twice", floats({1, 2}), 2);
  [commands enqueue];
  CHECK(commands.status == MTLCommandBufferStatusEnqueued);
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusCompleted && !commands.error);
  CHECK(commands.kernelStartTime > 0 && commands.GPUStartTime > 0);
  CHECK(commands.GPUEndTime >= commands.GPUStartTime);
  CHECK(commands.kernelEndTime >= commands.kernelStartTime);
}

// The caller goes on while the kernel runs.
TEST(asynchronous) {
  id<MTLBuffer> stop = floats({0});
  id<MTLCommandBuffer> commands = endless(queue(), stop);
  [commands commit];
  [commands waitUntilScheduled];
  CHECK(commands.status == MTLCommandBufferStatusScheduled);
  set(stop);
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusCompleted);
}

TEST(handlers) {
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  id<MTLBuffer> x = floats({1});
  encode(commands, @"twice", x, 1);
  NSMutableArray* order = [NSMutableArray array];
  [commands addScheduledHandler:^(id<MTLCommandBuffer> buffer) {
    CHECK(buffer == commands && contents(x)[0] == 1);
    [order addObject:@"scheduled"];
  }];
  for (int i = 0; i < 2; ++i) {
    [commands addCompletedHandler:^(id<MTLCommandBuffer> buffer) {
      CHECK(buffer.status == MTLCommandBufferStatusCompleted && contents(x)[0] == 2);
      CHECK(buffer.GPUEndTime > 0);
      [order addObject:@(i)];
    }];
  }
  [commands commit];
  [commands waitUntilCompleted];
  CHECK([order isEqualToArray:(@[ @"scheduled", @0, @1 ])]);
}

// A program may let go of everything but the handler.
TEST(nobody_holds_the_command_buffer) {
  dispatch_semaphore_t done = dispatch_semaphore_create(0);
  id<MTLBuffer> x = floats({3});
  @autoreleasepool {
    id<MTLCommandBuffer> commands = [queue() commandBuffer];
    encode(commands, @"twice", x, 1);
    [commands addCompletedHandler:^(id<MTLCommandBuffer>) {
      dispatch_semaphore_signal(done);
    }];
    [commands commit];
  }
  dispatch_semaphore_wait(done, DISPATCH_TIME_FOREVER);
  CHECK(contents(x)[0] == 6);
}

// In the order of enqueue, not of commit.
TEST(order_within_a_queue) {
  id<MTLCommandQueue> on = queue();
  id<MTLBuffer> x = floats({1});
  id<MTLCommandBuffer> first = [on commandBuffer], second = [on commandBuffer];
  [first enqueue];
  [second enqueue];
  NSMutableArray* order = [NSMutableArray array];
  [first addCompletedHandler:^(id<MTLCommandBuffer>) {
    [order addObject:@1];
  }];
  [second addCompletedHandler:^(id<MTLCommandBuffer>) {
    [order addObject:@2];
  }];
  encode(second, @"twice", x, 1);
  [second commit];
  encode(first, @"twice", x, 1);
  [first commit];
  [second waitUntilCompleted];
  CHECK([order isEqualToArray:(@[ @1, @2 ])]);
}

// An enqueued command buffer that is dropped leaves its place.
TEST(enqueued_and_dropped) {
  id<MTLCommandQueue> on = queue();
  @autoreleasepool {
    [[on commandBuffer] enqueue];
  }
  id<MTLCommandBuffer> next = [on commandBuffer];
  [next commit];
  [next waitUntilCompleted];
  CHECK(next.status == MTLCommandBufferStatusCompleted);
}

TEST(queues_run_side_by_side) {
  id<MTLBuffer> stop = floats({0});
  id<MTLCommandBuffer> blocked = endless(queue(), stop);
  [blocked commit];
  id<MTLCommandBuffer> other = [queue() commandBuffer];
  id<MTLBuffer> x = floats({4});
  encode(other, @"twice", x, 1);
  [other commit];
  [other waitUntilCompleted];
  CHECK(contents(x)[0] == 8 && blocked.status < MTLCommandBufferStatusCompleted);
  set(stop);
  [blocked waitUntilCompleted];
  CHECK(blocked.status == MTLCommandBufferStatusCompleted);
}

TEST(as_many_command_buffers_as_the_queue_may_have) {
  MTLCommandQueueDescriptor* descriptor = [[MTLCommandQueueDescriptor alloc] init];
  descriptor.maxCommandBufferCount = 1;
  id<MTLCommandQueue> on = [device() newCommandQueueWithDescriptor:descriptor];
  id<MTLBuffer> stop = floats({0});
  std::atomic<bool> has_second = false;
  std::thread other;
  @autoreleasepool {
    id<MTLCommandBuffer> first = endless(on, stop);
    [first commit];
    std::atomic<bool>* flag = &has_second;
    other = std::thread([on, flag] {
      @autoreleasepool {
        (void)[on commandBuffer];
        flag->store(true);
      }
    });
    [first waitUntilScheduled];
    CHECK(!has_second);
    set(stop);
    [first waitUntilCompleted];
  }
  other.join();
  CHECK(has_second);
}

TEST(from_many_threads) {
  id<MTLCommandQueue> on = queue();
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int t = 0; t < 4; ++t) {
    std::atomic<int>* count = &right;
    threads.emplace_back([on, count] {
      @autoreleasepool {
        for (int i = 0; i < 10; ++i) {
          id<MTLBuffer> x = floats({static_cast<float>(i)});
          id<MTLCommandBuffer> commands = [on commandBuffer];
          encode(commands, @"twice", x, 1);
          [commands commit];
          [commands waitUntilCompleted];
          *count += contents(x)[0] == static_cast<float>(2 * i);
        }
      }
    });
  }
  for (std::thread& each : threads) each.join();
  CHECK(right == 40);
}

// --- Encoders ---

TEST(arguments) {
  id<MTLBuffer> x = floats({0, 0, 1, 2});
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:pipeline(@"add")];
  const id<MTLBuffer> buffers[] = {x};
  const NSUInteger offsets[] = {8};
  [encoder setBuffers:buffers offsets:offsets withRange:NSMakeRange(0, 1)];
  float a = 10;
  [encoder setBytes:&a length:sizeof a atIndex:1];
  a = 99;  // the bytes were taken when they were set
  const MTLSize one = MTLSizeMake(1, 1, 1), two = MTLSizeMake(2, 1, 1);
  [encoder dispatchThreadgroups:one threadsPerThreadgroup:two];
  [encoder setBufferOffset:4 atIndex:0];  // what was dispatched before keeps its arguments
  [encoder dispatchThreadgroups:one threadsPerThreadgroup:two];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
  const float expected[] = {0, 10, 21, 12};
  for (int i = 0; i < 4; ++i) CHECK(contents(x)[i] == expected[i]);
}

TEST(threadgroup_memory) {
  id<MTLBuffer> x = floats({1, 2, 3, 4}), out = floats({0});
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  id<MTLComputeCommandEncoder> encoder =
      [commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
  CHECK(encoder.dispatchType == MTLDispatchTypeConcurrent);
  [encoder setComputePipelineState:pipeline(@"sum")];
  [encoder setBuffer:out offset:0 atIndex:0];
  [encoder setBuffer:x offset:0 atIndex:1];
  [encoder setThreadgroupMemoryLength:16 atIndex:0];
  [encoder dispatchThreadgroups:MTLSizeMake(1, 1, 1) threadsPerThreadgroup:MTLSizeMake(4, 1, 1)];
  [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(contents(out)[0] == 10);
}

TEST(dispatch_threads_leaves_edges_smaller) {
  id<MTLBuffer> out = [device() newBufferWithLength:10 * 16 options:0];
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:pipeline(@"position")];
  [encoder setBuffer:out offset:0 atIndex:0];
  [encoder dispatchThreads:MTLSizeMake(10, 1, 1) threadsPerThreadgroup:MTLSizeMake(4, 1, 1)];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
  const uint32_t* at = static_cast<const uint32_t*>(out.contents);
  for (uint32_t i = 0; i < 10; ++i, at += 4) {
    CHECK(at[0] == i && at[1] == i / 4 && at[2] == (i < 8 ? 4u : 2u) && at[3] == 4);
  }
}

TEST(indirect_dispatch) {
  id<MTLBuffer> out = [device() newBufferWithLength:12 * 16 options:0];
  const uint32_t sizes[] = {99, 3, 1, 1};
  id<MTLBuffer> grid = [device() newBufferWithBytes:sizes length:sizeof sizes options:0];
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:pipeline(@"position")];
  [encoder setBuffer:out offset:0 atIndex:0];
  [encoder dispatchThreadgroupsWithIndirectBuffer:grid
                             indirectBufferOffset:4
                            threadsPerThreadgroup:MTLSizeMake(4, 1, 1)];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(static_cast<const uint32_t*>(out.contents)[4 * 11] == 11);
}

TEST(empty_grid) {
  id<MTLBuffer> x = floats({1});
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  [encoder setComputePipelineState:pipeline(@"twice")];
  [encoder setBuffer:x offset:0 atIndex:0];
  [encoder dispatchThreadgroups:MTLSizeMake(0, 1, 1) threadsPerThreadgroup:MTLSizeMake(1, 1, 1)];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusCompleted && contents(x)[0] == 1);
}

TEST(blit) {
  id<MTLBuffer> x = floats({1, 2, 3, 4}), y = floats({5, 6, 7, 8});
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  id<MTLBlitCommandEncoder> encoder = [commands blitCommandEncoder];
  [encoder copyFromBuffer:x sourceOffset:4 toBuffer:y destinationOffset:8 size:8];
  [encoder fillBuffer:x range:NSMakeRange(0, 8) value:0];
  [encoder endEncoding];
  encode(commands, @"twice", y, 4);  // sees what the blit wrote
  [commands commit];
  [commands waitUntilCompleted];
  const float from[] = {0, 0, 3, 4}, to[] = {10, 12, 4, 6};
  for (int i = 0; i < 4; ++i) CHECK(contents(x)[i] == from[i] && contents(y)[i] == to[i]);
}

TEST(use_of_memory_that_is_not_retained) {
  id<MTLCommandBuffer> commands = [queue() commandBufferWithUnretainedReferences];
  CHECK(!commands.retainedReferences);
  @autoreleasepool {
    id<MTLBuffer> x = floats({1});
    x.label = @"gone";
    encode(commands, @"twice", x, 1);
  }
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusError);
  CHECK(commands.error.code == MTLCommandBufferErrorInvalidResource);
  CHECK_CONTAINS(commands.error.localizedDescription, "\"gone\" was released");
}

TEST(unretained_memory_that_lives) {
  id<MTLBuffer> x = floats({1});
  id<MTLCommandBuffer> commands = [queue() commandBufferWithUnretainedReferences];
  encode(commands, @"twice", x, 1);
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusCompleted && contents(x)[0] == 2);
}

// --- Errors ---

TEST(failed_check_of_a_kernel) {
  MTLCommandBufferDescriptor* descriptor = [[MTLCommandBufferDescriptor alloc] init];
  descriptor.errorOptions = MTLCommandBufferErrorOptionEncoderExecutionStatus;
  id<MTLCommandQueue> on = queue();
  id<MTLCommandBuffer> commands = [on commandBufferWithDescriptor:descriptor];
  id<MTLBuffer> x = [device() newBufferWithLength:4 * 64 options:0];
  for (NSString* name in @[ @"twice", @"not_all_reach", @"twice" ]) {
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
    encoder.label = name;
    [encoder insertDebugSignpost:@"here"];
    [encoder setComputePipelineState:pipeline(name)];
    [encoder setBuffer:x offset:0 atIndex:0];
    [encoder dispatchThreadgroups:MTLSizeMake(1, 1, 1) threadsPerThreadgroup:MTLSizeMake(64, 1, 1)];
    [encoder endEncoding];
  }
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusError);
  CHECK([commands.error.domain isEqualToString:MTLCommandBufferErrorDomain]);
  CHECK(commands.error.code == MTLCommandBufferErrorInternal);
  CHECK_CONTAINS(commands.error.localizedDescription, "not_all_reach");
  NSArray<id<MTLCommandBufferEncoderInfo>>* infos =
      commands.error.userInfo[MTLCommandBufferEncoderInfoErrorKey];
  CHECK(infos.count == 3);
  CHECK(infos[0].errorState == MTLCommandEncoderErrorStateCompleted);
  CHECK(infos[1].errorState == MTLCommandEncoderErrorStateFaulted);
  CHECK(infos[2].errorState == MTLCommandEncoderErrorStatePending);
  CHECK([infos[1].label isEqualToString:@"not_all_reach"]);
  CHECK([infos[1].debugSignposts isEqualToArray:@[ @"here" ]]);

  // The next one is not poisoned.
  id<MTLCommandBuffer> next = [on commandBuffer];
  id<MTLBuffer> y = floats({1});
  encode(next, @"twice", y, 1);
  [next commit];
  [next waitUntilCompleted];
  CHECK(next.status == MTLCommandBufferStatusCompleted && contents(y)[0] == 2);
}

static void check_fault(const char* name, MTLCommandBufferError code, const char* text) {
  CHECK(softmetal_inject_fault(name, 1));
  for (int i = 0; i < 2; ++i) {
    id<MTLBuffer> x = floats({1});
    id<MTLCommandBuffer> commands = [queue() commandBuffer];
    encode(commands, @"twice", x, 1);
    __block bool called = false;
    [commands addCompletedHandler:^(id<MTLCommandBuffer> buffer) {
      called = true;
      CHECK((buffer.error != nil) == (i == 0));
    }];
    [commands commit];
    [commands waitUntilCompleted];
    CHECK(called);
    if (i == 1) {
      CHECK(commands.status == MTLCommandBufferStatusCompleted && contents(x)[0] == 2);
    } else {
      CHECK(commands.status == MTLCommandBufferStatusError && contents(x)[0] == 1);
      CHECK(commands.error.code == static_cast<NSInteger>(code));
      CHECK_CONTAINS(commands.error.localizedDescription, text);
    }
  }
}

TEST(fault_command_buffer_error) {
  check_fault("command_buffer_error", MTLCommandBufferErrorInternal, "Internal Error");
}
TEST(fault_command_buffer_out_of_memory) {
  check_fault("command_buffer_out_of_memory", MTLCommandBufferErrorOutOfMemory,
              "Insufficient Memory");
}
TEST(fault_watchdog) {
  check_fault("watchdog", MTLCommandBufferErrorTimeout, "Caused GPU Timeout Error");
}
TEST(fault_slow_completion) {
  CHECK(softmetal_inject_fault("slow_completion", 1));
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.status == MTLCommandBufferStatusCompleted);
  CHECK(commands.GPUEndTime - commands.GPUStartTime > 0.19);
}

TEST(fault_lost_threadgroup) {
  for (const int count : {1, 0}) {
    CHECK(softmetal_inject_fault("lost_threadgroup", count));
    id<MTLBuffer> x = floats({1, 1, 1});
    id<MTLCommandBuffer> commands = [queue() commandBuffer];
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
    [encoder setComputePipelineState:pipeline(@"twice")];
    [encoder setBuffer:x offset:0 atIndex:0];
    [encoder dispatchThreadgroups:MTLSizeMake(3, 1, 1) threadsPerThreadgroup:MTLSizeMake(1, 1, 1)];
    [encoder endEncoding];
    [commands commit];
    [commands waitUntilCompleted];
    CHECK(commands.status == MTLCommandBufferStatusCompleted);
    CHECK(contents(x)[1] == 2 && contents(x)[2] == (count ? 1 : 2));
  }
}
TEST(fault_hang) {
  CHECK(softmetal_inject_fault("hang", 1));
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  [commands commit];
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  CHECK(commands.status != MTLCommandBufferStatusCompleted);
}

// The program is run with SOFTMETAL_TIME_LIMIT=0.2.
TEST(time_limit) {
  id<MTLCommandBuffer> commands = endless(queue(), floats({0}));
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.error.code == MTLCommandBufferErrorTimeout);
}
TEST(time_limit_of_an_event) {
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  [commands encodeWaitForEvent:[device() newEvent] value:1];
  [commands commit];
  [commands waitUntilCompleted];
  CHECK(commands.error.code == MTLCommandBufferErrorTimeout);
}

// --- Events ---

TEST(event_between_queues) {
  id<MTLEvent> event = [device() newEvent];
  id<MTLBuffer> x = floats({1});
  id<MTLCommandBuffer> waits = [queue() commandBuffer], signals = [queue() commandBuffer];
  [waits encodeWaitForEvent:event value:1];
  encode(waits, @"twice", x, 1);
  [waits commit];
  id<MTLComputeCommandEncoder> encoder = [signals computeCommandEncoder];
  [encoder setComputePipelineState:pipeline(@"add")];
  const float a = 10;
  [encoder setBuffer:x offset:0 atIndex:0];
  [encoder setBytes:&a length:sizeof a atIndex:1];
  [encoder dispatchThreads:MTLSizeMake(1, 1, 1) threadsPerThreadgroup:MTLSizeMake(1, 1, 1)];
  [encoder endEncoding];
  [signals encodeSignalEvent:event value:1];
  [signals commit];
  [waits waitUntilCompleted];
  CHECK(contents(x)[0] == 22);
}

TEST(shared_event) {
  id<MTLSharedEvent> event = [device() newSharedEvent];
  CHECK(event.signaledValue == 0);
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  [commands encodeWaitForEvent:event value:1];
  [commands encodeSignalEvent:event value:2];
  dispatch_semaphore_t told = dispatch_semaphore_create(0);
  MTLSharedEventListener* listener = [[MTLSharedEventListener alloc] init];
  [event notifyListener:listener
                atValue:2
                  block:^(id<MTLSharedEvent> which, uint64_t value) {
                    CHECK(which == event && value == 2);
                    dispatch_semaphore_signal(told);
                  }];
  [commands commit];
  CHECK(![event waitUntilSignaledValue:2 timeoutMS:10]);
  event.signaledValue = 1;
  CHECK([event waitUntilSignaledValue:2 timeoutMS:60000]);
  dispatch_semaphore_wait(told, DISPATCH_TIME_FOREVER);
  [commands waitUntilCompleted];
  CHECK(event.signaledValue == 2);
}

// --- Counters ---

TEST(counters) {
  CHECK(softmetal_set_instrumentation("counters"));
  CHECK(!softmetal_set_instrumentation("no_such"));
  softmetal_counters_reset();
  id<MTLBuffer> x = floats({1, 2, 3});
  id<MTLCommandBuffer> commands = [queue() commandBuffer];
  encode(commands, @"twice", x, 3);
  encode(commands, @"twice", x, 3);
  [commands commit];
  [commands waitUntilCompleted];  // another queue need not wait for it
  id<MTLCommandBuffer> others = [queue() commandBuffer];
  encode(others, @"twice", x, 3);
  [others commit];
  [others waitUntilCompleted];
  std::vector<char> text(softmetal_counters_json(nullptr, 0));
  CHECK(softmetal_counters_json(text.data(), text.size()) == text.size());
  NSString* json = @(text.data());
  CHECK_CONTAINS(json, "\"kernel\": \"twice\"");
  CHECK_CONTAINS(json, "\"device_bytes_read\": 12");
  CHECK_CONTAINS(json, "\"device_bytes_written\": 12");
  CHECK_CONTAINS(json, "\"threads\": 3");
  std::vector<std::string> numbers;
  const std::string all = text.data(), key = "\"command_buffer\": ";
  for (size_t at = 0; (at = all.find(key, at)) != std::string::npos; at += key.size()) {
    const size_t begin = at + key.size();
    numbers.push_back(all.substr(begin, all.find(',', begin) - begin));
  }
  CHECK(numbers.size() == 3);
  CHECK(numbers[0] == numbers[1] && numbers[1] != numbers[2]);
  softmetal_counters_reset();
  CHECK(softmetal_counters_json(nullptr, 0) == 3);
}

int main(int argc, const char** argv) { return run_tests(argc, argv); }
