// Runs the threadgroups of a dispatch one after another on one host thread: a fiber for each
// thread, scheduled cooperatively, so that a run is the same every time.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "executor/access_map.h"
#include "executor/faults.h"
#include "executor/fiber.h"
#include "softmetal/executor.h"

namespace softmetal {

class Worker {
 public:
  Worker(const Dispatch& dispatch, const Launch& launch, AccessMap& accesses);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // False where a check failed: message() says which.
  bool run(const uint32_t position[3]);

  const std::string& message() const { return message_; }
  bool timed_out() const { return timed_out_; }
  const Counters& counters() const { return counters_; }

  // The worker of the fiber that runs on this host thread.
  static Worker* current();

  // Called on a fiber.
  const Thread* thread() const { return &lane_->thread; }
  const unsigned char* exchange(const void* value, uint32_t size, const char* operation);
  void simdgroup_barrier(uint32_t flags);
  void threadgroup_barrier(uint32_t flags);
  void* variable(const void* id, const char* name, uint32_t size, uint32_t alignment);
  void uniform(const char* operation);
  bool is_threadgroup_memory(const void* address) const;
  // A failed check, in two steps: the stack of a fiber is left as it is, without destructors, so
  // nothing may be alive on it that owns memory when the dispatch is abandoned.
  void note(const std::string& what);
  [[noreturn]] void abandon();

  // Called by a signal handler on the worker's thread, see executor/faults.h.
  bool runs_fiber() const { return lane_ != nullptr; }
  [[noreturn]] void fault(int signal, const void* address);
  // Fails if the dispatch is over and the fiber is in the kernel's own code, which holds no lock.
  void interrupt(uintptr_t program_counter);

  void count(Work work, uint64_t amount);
  void access(const void* address, uint64_t size, bool is_write);

 private:
  enum class State : uint8_t { kReady, kInSimdgroup, kAtBarrier, kDone };
  struct Lane {
    Thread thread = {};
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    void* sanitizer_fiber = nullptr;  // ThreadSanitizer's
    void* fake_stack = nullptr;       // AddressSanitizer's
    uint64_t history = 0;             // of operations without a rendezvous
    State state = State::kReady;
  };
  struct Simdgroup {
    uint32_t size = 0, live = 0, arrived = 0;
    uint32_t ready = 0;  // bit i: lane i can run
    uint32_t parity = 0;
    const char* operation = nullptr;  // of those that wait
    uint64_t history = 0;
    uint32_t first = 0;  // lane that arrived first
    char ordering = 0;   // an address for ThreadSanitizer
    alignas(64) unsigned char slots[2][kSimdgroupWidth * 64] = {};
  };
  struct Variable {
    const void* id;
    void* address;
  };

  void place(const uint32_t position[3]);
  bool allocate_arguments();
  void* allocate(uint32_t size, uint32_t alignment);
  void new_arena();
  void drop_arenas();

  Lane* next();
  void block(State state);
  void switch_to(Lane* lane);
  void check_limits();
  void finish();
  static void start();

  std::string where() const;
  const Argument* argument_without_length() const;

  const Dispatch& dispatch_;
  const Launch& launch_;
  AccessMap& accesses_;
  const SignalStack signal_stack_;
  const CodeRange code_;  // the kernel's; empty where nothing ends the dispatch
  StackPool stacks_;
  std::vector<Lane> lanes_;
  std::vector<Simdgroup> simdgroups_;
  std::vector<Variable> variables_;
  void* arguments_[kThreadgroupSlots] = {};
  std::vector<char*> arenas_;  // kept until the end under ThreadSanitizer
  uint32_t arena_used_ = 0, threadgroup_bytes_ = 0;

  Lane* lane_ = nullptr;
  void* host_stack_pointer_ = nullptr;
  void* host_sanitizer_fiber_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_size_ = 0;
  bool host_stack_known_ = false;

  uint32_t threads_ = 0, live_ = 0, at_barrier_ = 0;
  uint64_t random_ = 0;
  char start_ordering_ = 0, end_ordering_ = 0, barrier_ordering_ = 0;
  bool failed_ = false, timed_out_ = false;
  std::string message_;
  Counters counters_;
  std::chrono::steady_clock::time_point deadline_;
};

}  // namespace softmetal
