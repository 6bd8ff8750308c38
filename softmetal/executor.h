// Runs kernels of an image. Any number of host threads may dispatch at the same time; a failed
// check abandons its dispatch and comes back as a message.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "softmetal/image.h"

namespace softmetal {

struct FunctionConstantValue {
  uint32_t index = 0;
  std::string name;  // used where `by_name`
  bool by_name = false;
  std::vector<unsigned char> bytes;
};

// What an image declares, seen once when it is opened.
struct FunctionConstant {
  uint32_t index;
  std::string name;
  std::string type;
  uint32_t size;
  bool is_defined;  // the opener gave a value
};

class Image {
 public:
  // Maps a private copy of the file, with these constants set. Null and a message where it fails.
  static std::shared_ptr<Image> open(const std::string& path,
                                     const std::vector<FunctionConstantValue>& constants,
                                     std::string* error);
  virtual ~Image() = default;
  virtual const std::vector<const Kernel*>& kernels() const = 0;
  virtual const std::vector<FunctionConstant>& function_constants() const = 0;
  // Of a kernel: its name, the constants that the opener gave and the file's name.
  virtual std::string pipeline(const std::string& kernel) const = 0;
  const Kernel* find(const std::string& name) const;
};

// Adds a line to the file that SOFTMETAL_PIPELINES names, the first time that this process sees the
// pipeline.
void record_pipeline(const std::string& pipeline);

struct BufferBinding {
  void* address = nullptr;  // null: not bound
  uint64_t length = 0;      // bytes from `address`
};

struct Dispatch {
  const Kernel* kernel = nullptr;
  BufferBinding buffers[kBufferSlots];
  uint32_t threadgroup_bytes[kThreadgroupSlots] = {};  // 0: no length given
  uint32_t threads_per_threadgroup[3] = {1, 1, 1};
  // Exactly one of the two kinds of grid; dispatchThreads may leave threadgroups at the edge
  // smaller.
  bool grid_in_threads = false;
  uint32_t grid[3] = {1, 1, 1};
  uint64_t seed = 0;      // 0: lanes in order; else a fixed pseudo-random order of fibers
  uint32_t workers = 0;   // threads that share the threadgroups; 0: one per core
  double time_limit = 0;  // seconds; 0: none. Past it the dispatch is abandoned
  const std::atomic<bool>* cancelled = nullptr;
};

// Work done by a dispatch. Bytes, products and exponentials are zero unless the image was compiled
// with Instrumentation::kCounters; the rest is always counted. Bytes are those of the loads and
// stores that clang -O2 leaves (a value that a thread loads twice may be loaded once); atomic
// operations are not among them. Multiply-accumulates are fma, dot, products of matrices, and
// floating-point products that are added or subtracted in the same expression.
struct Counters {
  uint64_t device_bytes_read = 0;
  uint64_t device_bytes_written = 0;
  uint64_t device_bytes_read_unique = 0;
  uint64_t device_bytes_written_unique = 0;
  uint64_t threadgroup_bytes_read = 0;
  uint64_t threadgroup_bytes_written = 0;
  uint64_t threadgroup_memory_peak = 0;  // bytes allocated by one threadgroup, static and dynamic
  uint64_t multiply_accumulates = 0;
  uint64_t exp2 = 0;
  uint64_t threadgroup_barriers = 0;  // per threadgroup, not per thread
  uint64_t simdgroup_barriers = 0;    // per simdgroup
  uint64_t simdgroup_operations = 0;  // per simdgroup
  uint64_t threads = 0;
  uint64_t fiber_switches = 0;
};

struct DispatchResult {
  bool ok = false;
  bool timed_out = false;
  std::string message;  // empty where ok
  Counters counters;
};

DispatchResult run(const Dispatch& dispatch);

}  // namespace softmetal
