#include "executor/worker.h"

#include <sys/mman.h>

#include <algorithm>
#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "executor/sanitizers.h"

namespace softmetal {
namespace {

constexpr size_t kArenaBytes = 128 << 10;
// Between threadgroup arrays, so that AddressSanitizer sees a step past an end.
constexpr uint32_t kGap = 64;
// Switches between two looks at the clock.
constexpr uint64_t kSwitchesOfALook = 1024;

// Read by signal handlers: a model of storage that allocates nothing when it is first read.
__attribute__((tls_model("initial-exec"))) thread_local Worker* current_worker = nullptr;

// Sanitizers intercept memcpy and memset, and would take these for accesses of the kernel.
void copy(void* to, const void* from, uint32_t size) {
  auto* a = static_cast<volatile unsigned char*>(to);
  const auto* b = static_cast<const volatile unsigned char*>(from);
  for (uint32_t i = 0; i < size; ++i) a[i] = b[i];
}
void fill(void* to, unsigned char byte, size_t size) {
  auto* a = static_cast<volatile unsigned char*>(to);
  for (size_t i = 0; i < size; ++i) a[i] = byte;
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

uint64_t mix(uint64_t x) {  // SplitMix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

const char* shown(const char* operation) { return operation[0] == '.' ? operation + 1 : operation; }

}  // namespace

Worker* Worker::current() { return current_worker; }

Worker::Worker(const Dispatch& dispatch, const Launch& launch, AccessMap& accesses)
    : dispatch_(dispatch),
      launch_(launch),
      accesses_(accesses),
      code_(dispatch.time_limit > 0 || dispatch.cancelled
                ? code_around(reinterpret_cast<const void*>(dispatch.kernel->entry))
                : CodeRange()) {
  const uint32_t* size = dispatch.threads_per_threadgroup;
  const uint32_t most = size[0] * size[1] * size[2];
  lanes_.resize(most);
  simdgroups_.resize((most + kSimdgroupWidth - 1) / kSimdgroupWidth);
  if (dispatch.time_limit > 0) {
    deadline_ = std::chrono::steady_clock::now() +
                std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                    std::chrono::duration<double>(dispatch.time_limit));
  }
}

// What threadgroups did is seen by the host when all have ended, not by those that come later: the
// order of threadgroups is no one's to rely on.
Worker::~Worker() {
  sanitizer::acquire(&end_ordering_);
  drop_arenas();
}

void Worker::new_arena() {
  void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();  // 128 KiB of address space
  arenas_.push_back(static_cast<char*>(memory));
  arena_used_ = kGap;
  sanitizer::poison(memory, kArenaBytes);
}

void Worker::drop_arenas() {
  for (char* arena : arenas_) {
    sanitizer::unpoison(arena, kArenaBytes);
    munmap(arena, kArenaBytes);
  }
  arenas_.clear();
}

// Filled with a pattern that is NaN in every float type; null past the limit.
void* Worker::allocate(uint32_t size, uint32_t alignment) {
  if (threadgroup_bytes_ + size > kThreadgroupMemoryLimit) return nullptr;
  threadgroup_bytes_ += size;
  alignment = std::max<uint32_t>(alignment, 16);
  arena_used_ = (arena_used_ + alignment - 1) / alignment * alignment;
  char* memory = arenas_.back() + arena_used_;
  // The end is exact; the gap starts there.
  arena_used_ += size + kGap;
  sanitizer::unpoison(memory, size);
  fill(memory, 0xFF, size);
  return memory;
}

bool Worker::allocate_arguments() {
  for (uint32_t i = 0; i < kThreadgroupSlots; ++i) {
    const uint32_t size = dispatch_.threadgroup_bytes[i];
    arguments_[i] = size == 0 ? nullptr : allocate(size, 16);
    if (size != 0 && !arguments_[i]) return false;
  }
  return true;
}

// Threads of the threadgroup at `position`.
void Worker::place(const uint32_t position[3]) {
  const uint32_t* size = launch_.threads_per_threadgroup;
  uint32_t actual[3];
  for (int d = 0; d < 3; ++d) {
    actual[d] = std::min(size[d], launch_.threads_per_grid[d] - position[d] * size[d]);
  }
  threads_ = live_ = actual[0] * actual[1] * actual[2];
  at_barrier_ = 0;
  const uint32_t groups = (threads_ + kSimdgroupWidth - 1) / kSimdgroupWidth;
  for (uint32_t g = 0; g < groups; ++g) {
    Simdgroup& group = simdgroups_[g];
    group.size = group.live = std::min(kSimdgroupWidth, threads_ - g * kSimdgroupWidth);
    group.arrived = group.parity = 0;
    group.ready = group.size == 32 ? ~0u : (1u << group.size) - 1;
  }
  for (uint32_t i = 0; i < threads_; ++i) {
    Lane& lane = lanes_[i];
    lane = Lane();
    lane.stack = stacks_.stack(i);
    if (!lane.stack) std::abort();
    Thread& t = lane.thread;
    t.launch = &launch_;
    t.threadgroup_memory = arguments_;
    const uint32_t in[3] = {i % actual[0], i / actual[0] % actual[1], i / (actual[0] * actual[1])};
    for (int d = 0; d < 3; ++d) {
      t.threadgroup_position_in_grid[d] = position[d];
      t.actual_threads_per_threadgroup[d] = actual[d];
      t.thread_position_in_threadgroup[d] = in[d];
      t.thread_position_in_grid[d] = position[d] * size[d] + in[d];
    }
    t.thread_index_in_threadgroup = i;
    t.thread_index_in_simdgroup = i % kSimdgroupWidth;
    t.simdgroup_index_in_threadgroup = i / kSimdgroupWidth;
    t.threads_in_simdgroup = simdgroups_[i / kSimdgroupWidth].size;
    t.simdgroups_per_threadgroup = groups;
    if (sanitizer::thread()) {
      StackPool::renew(lane.stack);
      lane.sanitizer_fiber = __tsan_create_fiber(0);
    }
    lane.stack_pointer = prepare_fiber(lane.stack, &Worker::start);
  }
}

bool Worker::run(const uint32_t position[3]) {
  Worker* const outer = current_worker;
  // A handler that is left takes the modes of floating-point arithmetic with it.
  std::fenv_t modes;
  std::fegetenv(&modes);
  current_worker = this;
  lane_ = nullptr;
  threadgroup_bytes_ = 0;
  variables_.clear();
  // Under ThreadSanitizer memory is not used again: accesses of two threadgroups would be a race.
  if (!sanitizer::thread()) drop_arenas();
  new_arena();
  random_ = dispatch_.seed == 0
                ? 0
                : mix(dispatch_.seed + mix(position[0] + mix(position[1] + mix(position[2]))));
  if (!allocate_arguments()) {
    failed_ = true;
    message_ = std::string(dispatch_.kernel->name) +
               ": threadgroup memory of the arguments exceeds 32768 bytes";
  } else {
    if (sanitizer::thread()) host_sanitizer_fiber_ = __tsan_get_current_fiber();
    place(position);
    sanitizer::release(&start_ordering_);
    switch_to(next());
    lane_ = nullptr;
    for (uint32_t i = 0; i < threads_; ++i) {
      if (lanes_[i].sanitizer_fiber) __tsan_destroy_fiber(lanes_[i].sanitizer_fiber);
    }
    counters_.threads += threads_;
    counters_.threadgroup_memory_peak =
        std::max<uint64_t>(counters_.threadgroup_memory_peak, threadgroup_bytes_);
  }
  current_worker = outer;
  if (failed_) std::fesetenv(&modes);
  return !failed_;
}

// Where a fiber begins.
void Worker::start() {
  Worker* worker = current_worker;
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    // What the hook gives is the stack that was left: the host's for the first fiber alone.
    if (!worker->host_stack_known_) {
      worker->host_stack_ = bottom;
      worker->host_stack_size_ = size;
      worker->host_stack_known_ = true;
    }
  }
  sanitizer::acquire(&worker->start_ordering_);
  worker->dispatch_.kernel->entry(&worker->lane_->thread);
  sanitizer::release(&worker->end_ordering_);
  worker->finish();
  std::abort();  // a finished fiber is not resumed
}

void Worker::finish() {
  Simdgroup& group = simdgroups_[lane_->thread.simdgroup_index_in_threadgroup];
  lane_->state = State::kDone;
  group.ready &= ~(1u << lane_->thread.thread_index_in_simdgroup);
  --group.live;
  --live_;
  if (group.arrived != 0 && group.arrived == group.live) {
    note(std::string(shown(group.operation)) + " is not reached by all threads of simdgroup " +
         std::to_string(lane_->thread.simdgroup_index_in_threadgroup) + ": " +
         std::to_string(group.arrived) + " wait in it, " + std::to_string(group.size - group.live) +
         " have returned");
    abandon();
  }
  if (at_barrier_ != 0 && at_barrier_ == live_) {
    note("threadgroup_barrier is not reached by all threads: " + std::to_string(at_barrier_) +
         " wait at it, " + std::to_string(threads_ - live_) + " have returned");
    abandon();
  }
  switch_to(next());
}

Worker::Lane* Worker::next() {
  const uint32_t groups = (threads_ + kSimdgroupWidth - 1) / kSimdgroupWidth;
  uint32_t first = lane_ ? lane_->thread.simdgroup_index_in_threadgroup : 0;
  uint32_t from = lane_ ? lane_->thread.thread_index_in_simdgroup : 0;
  if (random_ != 0) {
    random_ = mix(random_);
    from = static_cast<uint32_t>(random_ >> 32) % kSimdgroupWidth;
    // Another simdgroup now and then, else this one while it can.
    if ((random_ & 7) == 0) first = static_cast<uint32_t>(random_ >> 8) % groups;
  }
  for (uint32_t i = 0; i < groups; ++i) {
    const uint32_t g = first + i < groups ? first + i : first + i - groups;
    const uint32_t ready = simdgroups_[g].ready;
    if (ready == 0) continue;
    const uint32_t above = ready & ~((1u << from) - 1);
    return &lanes_[g * kSimdgroupWidth +
                   static_cast<uint32_t>(__builtin_ctz(above != 0 ? above : ready))];
  }
  return nullptr;
}

// The running fiber waits; another one runs.
void Worker::block(State state) {
  lane_->state = state;
  simdgroups_[lane_->thread.simdgroup_index_in_threadgroup].ready &=
      ~(1u << lane_->thread.thread_index_in_simdgroup);
  Lane* lane = next();
  if (lane) {
    switch_to(lane);
    return;
  }
  uint32_t returned = 0, in_simdgroup = 0, at_barrier = 0;
  const char* operation = "";
  for (uint32_t i = 0; i < threads_; ++i) {
    returned += lanes_[i].state == State::kDone;
    at_barrier += lanes_[i].state == State::kAtBarrier;
    if (lanes_[i].state != State::kInSimdgroup) continue;
    ++in_simdgroup;
    operation = simdgroups_[i / kSimdgroupWidth].operation;
  }
  note("deadlock: " + std::to_string(at_barrier) + " threads wait at threadgroup_barrier, " +
       std::to_string(in_simdgroup) + " in " + shown(operation) + ", " + std::to_string(returned) +
       " have returned");
  abandon();
}

// To another fiber, or null: to the host.
void Worker::switch_to(Lane* to) {
  Lane* from = lane_;
  if (to == from && to) return;
  ++counters_.fiber_switches;
  if (to && counters_.fiber_switches % kSwitchesOfALook == 0 && !failed_) check_limits();
  lane_ = to;
  if (__sanitizer_start_switch_fiber) {
    void** fake = !from                         ? &host_fake_stack_
                  : from->state == State::kDone ? nullptr
                                                : &from->fake_stack;
    __sanitizer_start_switch_fiber(fake, to ? to->stack : host_stack_,
                                   to ? kStackBytes : host_stack_size_);
  }
  // Without ordering: that is what barriers give.
  if (sanitizer::thread()) {
    __tsan_switch_to_fiber(to ? to->sanitizer_fiber : host_sanitizer_fiber_, 1);
  }
  softmetal_switch(from ? &from->stack_pointer : &host_stack_pointer_,
                   to ? to->stack_pointer : host_stack_pointer_);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(lane_ ? lane_->fake_stack : host_fake_stack_, nullptr, nullptr);
  }
}

void Worker::check_limits() {
  if (dispatch_.cancelled && dispatch_.cancelled->load(std::memory_order_relaxed)) {
    note("cancelled");
    abandon();
  }
  if (dispatch_.time_limit > 0 && std::chrono::steady_clock::now() > deadline_) {
    timed_out_ = true;
    note("time limit of " + std::to_string(dispatch_.time_limit) + " s exceeded");
    abandon();
  }
}

std::string Worker::where() const {
  const Thread& t = lane_->thread;
  const auto three = [](const uint32_t* x) {
    return "(" + std::to_string(x[0]) + ", " + std::to_string(x[1]) + ", " + std::to_string(x[2]) +
           ")";
  };
  return "threadgroup " + three(t.threadgroup_position_in_grid) + ", thread " +
         three(t.thread_position_in_threadgroup);
}

void Worker::note(const std::string& what) {
  message_ = std::string(dispatch_.kernel->name) + ": " + what + " (" + where() + ")";
}

// Back to the host; the fibers of the threadgroup are not resumed.
void Worker::abandon() {
  failed_ = true;
  lane_->state = State::kDone;
  switch_to(nullptr);
  std::abort();
}

void Worker::fault(int signal, const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx",
                static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(address)));
  const auto* byte = static_cast<const char*>(address);
  if (signal == SIGSEGV && byte < lane_->stack && byte >= lane_->stack - kGuardBytes) {
    note("stack overflow: a thread has " + std::to_string(kStackBytes) + " bytes");
  } else if (signal == SIGFPE) {
    note("integer division by zero, or of the smallest integer by -1");
  } else if (signal == SIGILL) {
    note("what the kernel does is undefined, at " + std::string(text));
  } else if (const Argument* argument = argument_without_length();
             argument && reinterpret_cast<uintptr_t>(address) < kThreadgroupMemoryLimit) {
    note("argument " + std::string(argument->name) + " [[threadgroup(" +
         std::to_string(argument->index) + ")]] has no length");
  } else {
    note("invalid access of memory at " + std::string(text));
  }
  abandon();
}

// Threadgroup memory that was given no length, which the kernel sees as null.
const Argument* Worker::argument_without_length() const {
  const Kernel& kernel = *dispatch_.kernel;
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const Argument& argument = kernel.arguments[i];
    const bool is_enabled = !argument.is_enabled || argument.is_enabled();
    if (is_enabled && argument.kind == ArgumentKind::kThreadgroup &&
        dispatch_.threadgroup_bytes[argument.index] == 0) {
      return &argument;
    }
  }
  return nullptr;
}

void Worker::interrupt(uintptr_t program_counter) {
  if (code_.contains(program_counter)) check_limits();
}

const unsigned char* Worker::exchange(const void* value, uint32_t size, const char* operation) {
  const uint32_t index = lane_->thread.simdgroup_index_in_threadgroup;
  Simdgroup& group = simdgroups_[index];
  unsigned char* slots = group.slots[group.parity];
  const uint32_t me = lane_->thread.thread_index_in_simdgroup;
  copy(slots + 64 * me, value, size);
  const uint64_t history = lane_->history;
  lane_->history = 0;
  if (group.arrived == 0) {
    group.operation = operation;
    group.history = history;
    group.first = me;
  } else if (!same(group.operation, operation)) {
    note("lanes of simdgroup " + std::to_string(index) + " are in different operations: lane " +
         std::to_string(me) + " in " + shown(operation) + ", lane " + std::to_string(group.first) +
         " in " + shown(group.operation));
    abandon();
  } else if (group.history != history) {
    note("before " + std::string(shown(operation)) + ", lane " + std::to_string(me) +
         " of simdgroup " + std::to_string(index) +
         " went through other matrix operations than lane " + std::to_string(group.first));
    abandon();
  }
  if (++group.arrived < group.live) {
    block(State::kInSimdgroup);
    return slots;
  }
  if (group.live != group.size) {
    note(std::string(shown(operation)) + " is reached by " + std::to_string(group.live) + " of " +
         std::to_string(group.size) + " threads of simdgroup " + std::to_string(index) +
         "; the others have returned");
    abandon();
  }
  group.arrived = 0;
  group.parity ^= 1;
  if (operation[0] != '.') ++counters_.simdgroup_operations;
  for (uint32_t i = 0; i < group.size; ++i) {
    Lane& lane = lanes_[index * kSimdgroupWidth + i];
    if (lane.state != State::kInSimdgroup) continue;
    lane.state = State::kReady;
    group.ready |= 1u << i;
  }
  return slots;
}

void Worker::simdgroup_barrier(uint32_t flags) {
  Simdgroup& group = simdgroups_[lane_->thread.simdgroup_index_in_threadgroup];
  const bool orders = (flags & (kMemDevice | kMemThreadgroup)) != 0;
  if (orders) sanitizer::release(&group.ordering);
  const unsigned char nothing = 0;
  if (lane_->thread.thread_index_in_simdgroup == 0) ++counters_.simdgroup_barriers;
  exchange(&nothing, 1, ".simdgroup_barrier");
  if (orders) sanitizer::acquire(&group.ordering);
}

void Worker::threadgroup_barrier(uint32_t flags) {
  const bool orders = (flags & (kMemDevice | kMemThreadgroup)) != 0;
  if (orders) sanitizer::release(&barrier_ordering_);
  const Simdgroup& group = simdgroups_[lane_->thread.simdgroup_index_in_threadgroup];
  if (group.arrived != 0) {
    note("threadgroup_barrier reached while lane " + std::to_string(group.first) +
         " of the simdgroup is in " + shown(group.operation));
    abandon();
  }
  if (++at_barrier_ < live_) {
    block(State::kAtBarrier);
  } else {
    if (live_ != threads_) {
      note("threadgroup_barrier is reached by " + std::to_string(live_) + " of " +
           std::to_string(threads_) + " threads; the others have returned");
      abandon();
    }
    at_barrier_ = 0;
    ++counters_.threadgroup_barriers;
    for (uint32_t i = 0; i < threads_; ++i) {
      if (lanes_[i].state != State::kAtBarrier) continue;
      lanes_[i].state = State::kReady;
      simdgroups_[i / kSimdgroupWidth].ready |= 1u << i % kSimdgroupWidth;
    }
  }
  if (orders) sanitizer::acquire(&barrier_ordering_);
}

void* Worker::variable(const void* id, const char* name, uint32_t size, uint32_t alignment) {
  for (const Variable& each : variables_) {
    if (each.id == id) return each.address;
  }
  void* memory = allocate(size, alignment);
  if (!memory) {
    note("threadgroup memory exceeds 32768 bytes: " + std::to_string(threadgroup_bytes_) + " and " +
         std::to_string(size) + " for " + name);
    abandon();
  }
  variables_.push_back({id, memory});
  return memory;
}

void Worker::uniform(const char* operation) {
  if (lane_->thread.thread_index_in_simdgroup == 0) ++counters_.simdgroup_operations;
  uint64_t hash = lane_->history;
  for (const char* c = operation; *c; ++c) hash = hash * 31 + static_cast<unsigned char>(*c);
  lane_->history = mix(hash);
}

void Worker::count(Work work, uint64_t amount) {
  (work == Work::kExp2 ? counters_.exp2 : counters_.multiply_accumulates) += amount;
}

bool Worker::is_threadgroup_memory(const void* address) const {
  const auto* byte = static_cast<const char*>(address);
  return byte >= arenas_.back() && byte < arenas_.back() + kArenaBytes;
}

void Worker::access(const void* address, uint64_t size, bool is_write) {
  if (!lane_) return;
  if (is_threadgroup_memory(address)) {
    (is_write ? counters_.threadgroup_bytes_written : counters_.threadgroup_bytes_read) += size;
  } else if (accesses_.mark(address, size, is_write)) {
    (is_write ? counters_.device_bytes_written : counters_.device_bytes_read) += size;
  }
}

}  // namespace softmetal

#define SOFTMETAL_EXPORT extern "C" __attribute__((visibility("default")))

SOFTMETAL_EXPORT const softmetal::Thread* softmetal_thread() {
  return softmetal::current_worker->thread();
}
SOFTMETAL_EXPORT const unsigned char* softmetal_simd_exchange(const void* value, uint32_t size,
                                                              const char* operation) {
  return softmetal::current_worker->exchange(value, size, operation);
}
SOFTMETAL_EXPORT void softmetal_simdgroup_barrier(uint32_t flags) {
  softmetal::current_worker->simdgroup_barrier(flags);
}
SOFTMETAL_EXPORT void softmetal_threadgroup_barrier(uint32_t flags) {
  softmetal::current_worker->threadgroup_barrier(flags);
}
SOFTMETAL_EXPORT void* softmetal_threadgroup_variable(const void* id, const char* name,
                                                      uint32_t size, uint32_t alignment) {
  return softmetal::current_worker->variable(id, name, size, alignment);
}
SOFTMETAL_EXPORT void softmetal_simd_uniform(const char* operation) {
  softmetal::current_worker->uniform(operation);
}
SOFTMETAL_EXPORT bool softmetal_is_threadgroup_memory(const void* address) {
  return softmetal::current_worker->is_threadgroup_memory(address);
}
SOFTMETAL_EXPORT void softmetal_fail(const char* message) {
  softmetal::current_worker->note(message);
  softmetal::current_worker->abandon();
}
SOFTMETAL_EXPORT void softmetal_count(softmetal::Work work, uint64_t amount) {
  softmetal::current_worker->count(work, amount);
}
