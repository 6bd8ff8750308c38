// The contract between an image and the executor that runs it. An image is a Metal library compiled
// for this processor: a shared object made by compiler/ from MSL, one private copy per pipeline.
//
// Every kernel's translation unit includes this file, so it needs nothing of the standard library.
// All names exported by an image or by the executor for an image begin with softmetal_.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace softmetal {

constexpr uint32_t kSimdgroupWidth = 32;
constexpr uint32_t kBufferSlots = 31;
constexpr uint32_t kThreadgroupSlots = 31;
constexpr uint32_t kThreadgroupMemoryLimit = 32768;
constexpr uint32_t kMaxThreadsPerThreadgroup = 1024;

enum class ArgumentKind : uint8_t {
  kBuffer,       // device or constant pointer or reference: [[buffer(i)]]
  kThreadgroup,  // dynamic threadgroup memory: [[threadgroup(i)]]
  // The attributes below carry a value that the executor computes for each thread.
  kThreadPositionInGrid,
  kThreadPositionInThreadgroup,
  kThreadIndexInThreadgroup,
  kThreadgroupPositionInGrid,
  kThreadsPerThreadgroup,
  kDispatchThreadsPerThreadgroup,
  kThreadgroupsPerGrid,
  kThreadsPerGrid,
  kGridOrigin,
  kGridSize,
  kThreadIndexInSimdgroup,
  kSimdgroupIndexInThreadgroup,
  kSimdgroupsPerThreadgroup,
  kDispatchSimdgroupsPerThreadgroup,
  kThreadsPerSimdgroup,
  kThreadIndexInQuadgroup,
  kQuadgroupIndexInThreadgroup,
  kQuadgroupsPerThreadgroup,
  kDispatchQuadgroupsPerThreadgroup,
};

enum class AddressSpace : uint8_t { kThread, kThreadgroup, kDevice, kConstant };

// One parameter of a kernel, for reflection and for the checks before a dispatch.
struct Argument {
  const char* name;
  const char* type_name;  // of the pointee where there is one, as the source spells it
  ArgumentKind kind;
  AddressSpace address_space;
  uint8_t index;          // of [[buffer(i)]] or [[threadgroup(i)]]
  bool is_reference;      // T&: at least element_size bytes must be bound
  bool is_writable;       // device T*, without const
  uint32_t element_size;  // sizeof the pointee; 0 where it is incomplete or void
  uint32_t element_alignment;
  // False where [[function_constant(c)]] removes the argument; null where there is no such
  // attribute.
  bool (*is_enabled)();
};

// What the executor tells a thread about itself. One per fiber; `launch` is shared by the dispatch.
struct Launch {
  uint32_t threads_per_threadgroup[3];  // as dispatched; edge threadgroups may have fewer threads
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_grid[3];
  void* buffers[kBufferSlots];  // never null for an argument that is enabled
};

struct Thread {
  const Launch* launch;
  void* const* threadgroup_memory;  // [kThreadgroupSlots], of this threadgroup
  uint32_t threadgroup_position_in_grid[3];
  uint32_t actual_threads_per_threadgroup[3];  // of this threadgroup
  uint32_t thread_position_in_threadgroup[3];
  uint32_t thread_position_in_grid[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t threads_in_simdgroup;  // below kSimdgroupWidth in the last simdgroup of a threadgroup
  uint32_t simdgroups_per_threadgroup;
};

struct Kernel {
  const char* name;  // host_name, or the function's own
  void (*entry)(const Thread*);
  const Argument* arguments;
  uint32_t argument_count;
  uint32_t max_total_threads_per_threadgroup;  // attribute of the same name; 0 where absent
  // Bytes of the threadgroup variables in the kernel's body; those of functions that it calls are
  // not among them. Complete once the image is open.
  const uint32_t* static_threadgroup_bytes;
};

// Events an image reports when it was compiled with work counters (SOFTMETAL_COUNT defined).
enum class Work : uint8_t {
  kMultiplyAccumulate,  // scalar ones: an 8x8x8 matrix product counts 512 for the whole simdgroup
  kExp2,                // exp, exp2, exp10 evaluated
};

// mem_flags of a barrier, as in Metal.
enum : uint32_t { kMemNone = 0, kMemDevice = 1, kMemThreadgroup = 2, kMemTexture = 4 };

}  // namespace softmetal

extern "C" {
// --- Called by an image while it is being opened (static initialisers) ---

void softmetal_register_kernel(const softmetal::Kernel*);

// Copies the value given for function constant `index` to `value` and returns true; returns false
// and leaves `value` alone where the pipeline gives none. Also records the constant for reflection.
// `type` is the MSL spelling ("bool", "uint", "float4", ...). Constants are read while the image is
// opened, so that constants derived from them are ordinary static initialisers.
bool softmetal_function_constant(uint32_t index, const char* name, const char* type, uint32_t size,
                                 void* value);

// --- Called by a running thread ---

const softmetal::Thread* softmetal_thread(void);

// A rendezvous of the simdgroup. Posts `size` <= 64 bytes and returns the slots of all 32 lanes, 64
// bytes apart, once every lane has posted; they stay valid until this lane's next rendezvous but
// one. `operation` names the caller ("simd_sum"; compared as text): lanes that meet in different
// operations, a lane that has returned, or one that waits at a barrier are errors, and the dispatch
// is abandoned. Gives no ordering of memory.
const unsigned char* softmetal_simd_exchange(const void* value, uint32_t size,
                                             const char* operation);
void softmetal_simdgroup_barrier(uint32_t mem_flags);
void softmetal_threadgroup_barrier(uint32_t mem_flags);

// Storage of a `threadgroup` variable declared in a kernel: the same for all threads of a
// threadgroup. `id` is the address of a static object of the image that identifies the variable.
void* softmetal_threadgroup_variable(const void* id, const char* name, uint32_t size,
                                     uint32_t alignment);

// A simdgroup operation that every lane evaluates for itself, without a rendezvous (matrix loads
// and products): folds `operation` into this lane's history, which the next rendezvous compares.
void softmetal_simd_uniform(const char* operation);

// Whether this is memory of the running threadgroup.
bool softmetal_is_threadgroup_memory(const void* address);

// Abandons the dispatch with a message; never returns.
[[noreturn]] void softmetal_fail(const char* message);

void softmetal_count(softmetal::Work, uint64_t amount);
}
