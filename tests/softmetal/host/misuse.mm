// One misuse of the interface for each check: the program ends with a message as from Metal's debug
// layer. The test that runs it compares the message with the one in MISUSE.
#include "check.h"

// MISUSE(name, message): as TEST; the message is read from this text by test_host.py.
#define MISUSE(name, message) TEST(name)

namespace {

struct Encoding {
  Encoding() = default;
  // With a pipeline of that kernel, and x as its buffer 0.
  explicit Encoding(NSString* kernel) {
    [encoder setComputePipelineState:pipeline(kernel)];
    [encoder setBuffer:x offset:0 atIndex:0];
  }

  id<MTLCommandQueue> queue = [device() newCommandQueue];
  id<MTLCommandBuffer> commands = [queue commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  id<MTLBuffer> x = [device() newBufferWithLength:64 options:MTLResourceStorageModeShared];
};

const MTLSize kOne = {1, 1, 1};

void dispatch(Encoding& e) { [e.encoder dispatchThreadgroups:kOne threadsPerThreadgroup:kOne]; }

id<MTLBlitCommandEncoder> blit(Encoding& e) {
  [e.encoder endEncoding];
  return [e.commands blitCommandEncoder];
}

}  // namespace

// --- Device and buffers ---

MISUSE(buffer_of_no_length, "length 0 must not be 0") {
  [device() newBufferWithLength:0 options:MTLResourceStorageModeShared];
}
MISUSE(buffer_too_long, "must not exceed") {
  [device() newBufferWithLength:device().maxBufferLength + 1 options:0];
}
MISUSE(no_copy_of_an_unaligned_pointer, "pointer") {
  static char memory[3 * 4096];
  char* aligned = memory + (4096 - reinterpret_cast<uintptr_t>(memory) % 4096);
  [device() newBufferWithBytesNoCopy:aligned + 64 length:4096 options:0 deallocator:nil];
}
MISUSE(no_copy_of_a_part_of_a_page, "length") {
  static char memory[3 * 4096];
  char* aligned = memory + (4096 - reinterpret_cast<uintptr_t>(memory) % 4096);
  [device() newBufferWithBytesNoCopy:aligned length:100 options:0 deallocator:nil];
}
MISUSE(modified_range_past_the_end, "exceeds the buffer's length(64)") {
  Encoding e;
  [e.encoder endEncoding];
  [e.x didModifyRange:NSMakeRange(60, 8)];
}
MISUSE(queue_for_no_command_buffer, "maxCommandBufferCount(0) must be > 0") {
  [device() newCommandQueueWithMaxCommandBufferCount:0];
}
MISUSE(library_of_nil, "source must not be nil") {
  NSString* nothing = nil;
  [device() newLibraryWithSource:nothing options:nil error:nil];
}
MISUSE(pipeline_of_nil, "computeFunction must not be nil") {
  id<MTLFunction> nothing = nil;
  [device() newComputePipelineStateWithFunction:nothing error:nil];
}
MISUSE(constant_of_a_type_that_is_none, "is not a type of function constants") {
  const float value = 0;
  [[[MTLFunctionConstantValues alloc] init] setConstantValue:&value
                                                        type:MTLDataTypeStruct
                                                     atIndex:0];
}

// --- Arguments ---

MISUSE(set_bytes_too_long, "length(5000) must be > 0 and <= 4096") {
  Encoding e;
  static const char bytes[5000] = {};
  [e.encoder setBytes:bytes length:sizeof bytes atIndex:0];
}
MISUSE(set_bytes_of_no_length, "length(0) must be > 0") {
  Encoding e;
  [e.encoder setBytes:"" length:0 atIndex:0];
}
MISUSE(buffer_index_31, "index(31) must be < 31") {
  Encoding e;
  [e.encoder setBuffer:e.x offset:0 atIndex:31];
}
MISUSE(bytes_index_31, "index(31) must be < 31") {
  Encoding e;
  [e.encoder setBytes:"1234" length:4 atIndex:31];
}
MISUSE(threadgroup_index_31, "index(31) must be < 31") {
  Encoding e;
  [e.encoder setThreadgroupMemoryLength:16 atIndex:31];
}
MISUSE(offset_at_the_end, "offset(64) must be < [buffer length](64)") {
  Encoding e;
  [e.encoder setBuffer:e.x offset:64 atIndex:0];
}
MISUSE(new_offset_at_the_end, "offset(64) must be < [buffer length](64)") {
  Encoding e;
  [e.encoder setBuffer:e.x offset:0 atIndex:0];
  [e.encoder setBufferOffset:64 atIndex:0];
}
MISUSE(new_offset_without_a_buffer, "no buffer is set at index(3)") {
  Encoding e;
  [e.encoder setBufferOffset:0 atIndex:3];
}
MISUSE(threadgroup_length_of_8, "length(8) must be a multiple of 16") {
  Encoding e;
  [e.encoder setThreadgroupMemoryLength:8 atIndex:0];
}
MISUSE(threadgroup_length_over_32_KiB, "length(32784) must be <= 32768") {
  Encoding e;
  [e.encoder setThreadgroupMemoryLength:32784 atIndex:0];
}

// --- Dispatches ---

MISUSE(no_pipeline, "No compute pipeline state is set") {
  Encoding e;
  dispatch(e);
}
MISUSE(nil_pipeline, "computePipelineState must not be nil") {
  Encoding e;
  id<MTLComputePipelineState> nothing = nil;
  [e.encoder setComputePipelineState:nothing];
}
MISUSE(missing_buffer, "Compute Function(twice): missing buffer binding at index 0 for x[0].") {
  Encoding e;
  [e.encoder setComputePipelineState:pipeline(@"twice")];
  dispatch(e);
}
MISUSE(buffer_taken_away, "missing buffer binding at index 0 for x[0].") {
  Encoding e(@"twice");
  [e.encoder setBuffer:nil offset:0 atIndex:0];
  dispatch(e);
}
MISUSE(buffer_too_small,
       "argument y[0] from buffer(1) with offset(56) and length(64) has space for 8 bytes, but "
       "argument has a length(16).") {
  Encoding e(@"add_vectors");
  [e.encoder setBuffer:e.x offset:56 atIndex:1];
  dispatch(e);
}
MISUSE(unaligned_offset, "must be a multiple of 16 but was set to 8.") {
  Encoding e(@"add_vectors");
  [e.encoder setBuffer:e.x offset:8 atIndex:1];
  dispatch(e);
}
MISUSE(bytes_that_are_written,
       "Bytes are being bound at index 0 to a shader argument with write access enabled.") {
  Encoding e;
  const float value = 0;
  [e.encoder setComputePipelineState:pipeline(@"twice")];
  [e.encoder setBytes:&value length:sizeof value atIndex:0];
  dispatch(e);
}
MISUSE(too_many_threads, "(2048) must be <= 1024. (device threadgroup size limit)") {
  Encoding e(@"twice");
  [e.encoder dispatchThreadgroups:kOne threadsPerThreadgroup:MTLSizeMake(64, 32, 1)];
}
MISUSE(too_many_threads_for_the_kernel, "(96) must be <= 64. (kernel threadgroup size limit)") {
  Encoding e(@"small");
  [e.encoder dispatchThreads:kOne threadsPerThreadgroup:MTLSizeMake(96, 1, 1)];
}
MISUSE(no_threads, "(0) must be > 0.") {
  Encoding e(@"twice");
  [e.encoder dispatchThreadgroups:kOne threadsPerThreadgroup:MTLSizeMake(8, 0, 1)];
}
MISUSE(too_much_threadgroup_memory, "Threadgroup memory size(36000) must be <= 32768") {
  Encoding e(@"static_memory");
  [e.encoder setThreadgroupMemoryLength:16000 atIndex:0];
  dispatch(e);
}
MISUSE(indirect_grid_past_the_end, "must be a multiple of 4 with 12 bytes") {
  Encoding e(@"twice");
  [e.encoder dispatchThreadgroupsWithIndirectBuffer:e.x
                               indirectBufferOffset:56
                              threadsPerThreadgroup:kOne];
}

// --- Encoders and command buffers ---

MISUSE(encoder_without_end, "Command encoder released without endEncoding") {
  @autoreleasepool {
    id<MTLCommandBuffer> commands = [[device() newCommandQueue] commandBuffer];
    (void)[commands computeCommandEncoder];
  }
}
MISUSE(second_encoder, "A command encoder is already encoding to this command buffer") {
  Encoding e;
  [e.commands blitCommandEncoder];
}
MISUSE(encoding_after_the_end, "encoding has ended") {
  Encoding e;
  [e.encoder endEncoding];
  [e.encoder setBuffer:e.x offset:0 atIndex:0];
}
MISUSE(end_of_encoding_twice, "encoding has ended") {
  Encoding e;
  [e.encoder endEncoding];
  [e.encoder endEncoding];
}
MISUSE(encoder_of_a_committed_command_buffer, "encoding to a committed command buffer") {
  Encoding e;
  [e.encoder endEncoding];
  [e.commands commit];
  [e.commands computeCommandEncoder];
}
MISUSE(event_while_encoding, "A command encoder is already encoding to this command buffer") {
  Encoding e;
  [e.commands encodeSignalEvent:[device() newEvent] value:1];
}
MISUSE(commit_with_an_open_encoder, "commit command buffer with uncommitted encoder") {
  Encoding e;
  [e.commands commit];
}
MISUSE(double_commit, "commit an already committed command buffer") {
  Encoding e;
  [e.encoder endEncoding];
  [e.commands commit];
  [e.commands commit];
}
MISUSE(double_enqueue, "enqueue an already enqueued command buffer") {
  Encoding e;
  [e.commands enqueue];
  [e.commands enqueue];
}
MISUSE(wait_before_commit, "the command buffer has not been committed") {
  Encoding e;
  [e.encoder endEncoding];
  [e.commands waitUntilCompleted];
}
MISUSE(handler_after_commit, "Completed handler provided after commit call") {
  Encoding e;
  [e.encoder endEncoding];
  [e.commands commit];
  [e.commands addCompletedHandler:^(id<MTLCommandBuffer>){
  }];
}
MISUSE(debug_group_that_was_not_pushed, "popDebugGroup without pushDebugGroup") {
  Encoding e;
  [e.encoder pushDebugGroup:@"group"];
  [e.encoder popDebugGroup];
  [e.encoder popDebugGroup];
}

// --- Blits ---

MISUSE(copy_past_the_end, "offset(32) + size(36) must be <= sourceBuffer.length(64)") {
  Encoding e;
  [blit(e) copyFromBuffer:e.x sourceOffset:32 toBuffer:e.x destinationOffset:0 size:36];
}
MISUSE(copy_of_3_bytes, "must be multiples of 4") {
  Encoding e;
  [blit(e) copyFromBuffer:e.x sourceOffset:32 toBuffer:e.x destinationOffset:0 size:3];
}
MISUSE(copy_onto_itself, "source and destination ranges overlap") {
  Encoding e;
  [blit(e) copyFromBuffer:e.x sourceOffset:16 toBuffer:e.x destinationOffset:0 size:32];
}
MISUSE(fill_past_the_end, "offset(60) + size(8) must be <= buffer.length(64)") {
  Encoding e;
  [blit(e) fillBuffer:e.x range:NSMakeRange(60, 8) value:1];
}

// Not a misuse: shows that the program ends for what it should, and for nothing else.
TEST(no_misuse) {
  Encoding e(@"add_vectors");
  [e.encoder setBuffer:e.x offset:48 atIndex:1];
  dispatch(e);
  [e.encoder endEncoding];
  [e.commands commit];
  [e.commands waitUntilCompleted];
  CHECK(e.commands.status == MTLCommandBufferStatusCompleted);
}

int main(int argc, const char** argv) {
  const char* validation = getenv("SOFTMETAL_VALIDATION");
  if (!validation) return run_tests(argc, argv);
  @try {
    return run_tests(argc, argv);
  } @catch (NSException* exception) {
    std::printf("raised: %s\n", exception.reason.UTF8String);
    return 3;
  }
}
