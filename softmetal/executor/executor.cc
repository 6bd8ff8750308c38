#include "softmetal/executor.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <thread>

#include "executor/faults.h"
#include "executor/worker.h"

namespace softmetal {
namespace {

std::string number(uint64_t x) { return std::to_string(x); }

// Everything that can be said before the first thread runs; empty where nothing is wrong.
std::string check(const Dispatch& dispatch) {
  const Kernel& kernel = *dispatch.kernel;
  const std::string name = kernel.name;
  const uint32_t* size = dispatch.threads_per_threadgroup;
  const uint64_t threads = uint64_t{size[0]} * size[1] * size[2];
  if (threads == 0 || threads > kMaxThreadsPerThreadgroup) {
    return name + ": " + number(threads) + " threads in a threadgroup; allowed: 1 to 1024";
  }
  const uint32_t most = kernel.max_total_threads_per_threadgroup;
  if (most != 0 && threads > most) {
    return name + ": " + number(threads) +
           " threads in a threadgroup; the kernel's max_total_threads_per_threadgroup is " +
           number(most);
  }
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const Argument& argument = kernel.arguments[i];
    if (argument.is_enabled && !argument.is_enabled()) continue;
    const std::string which = name + ": argument " + argument.name + " ";
    if (argument.kind == ArgumentKind::kThreadgroup) {
      if (argument.index >= kThreadgroupSlots) {
        return which + "has threadgroup index " + number(argument.index) + "; allowed: 0 to 30";
      }
      // One without a length may be one that the kernel does not use.
    }
    if (argument.kind != ArgumentKind::kBuffer) continue;
    if (argument.index >= kBufferSlots) {
      return which + "has buffer index " + number(argument.index) + "; allowed: 0 to 30";
    }
    const BufferBinding& buffer = dispatch.buffers[argument.index];
    const std::string slot = which + "[[buffer(" + number(argument.index) + ")]] ";
    if (!buffer.address) return slot + "is not bound";
    if (argument.is_reference && buffer.length < argument.element_size) {
      return slot + "has " + number(buffer.length) + " bytes; " + argument.type_name + " needs " +
             number(argument.element_size);
    }
    const uint32_t alignment = std::max<uint32_t>(argument.element_alignment, 1);
    if (reinterpret_cast<uintptr_t>(buffer.address) % alignment != 0) {
      return slot + "is not aligned to the " + number(alignment) + " bytes of " +
             argument.type_name;
    }
  }
  return "";
}

void add(Counters& into, const Counters& from) {
  into.device_bytes_read += from.device_bytes_read;
  into.device_bytes_written += from.device_bytes_written;
  into.device_bytes_read_unique += from.device_bytes_read_unique;
  into.device_bytes_written_unique += from.device_bytes_written_unique;
  into.threadgroup_bytes_read += from.threadgroup_bytes_read;
  into.threadgroup_bytes_written += from.threadgroup_bytes_written;
  into.threadgroup_memory_peak =
      std::max(into.threadgroup_memory_peak, from.threadgroup_memory_peak);
  into.multiply_accumulates += from.multiply_accumulates;
  into.exp2 += from.exp2;
  into.threadgroup_barriers += from.threadgroup_barriers;
  into.simdgroup_barriers += from.simdgroup_barriers;
  into.simdgroup_operations += from.simdgroup_operations;
  into.threads += from.threads;
  into.fiber_switches += from.fiber_switches;
}

}  // namespace

DispatchResult run(const Dispatch& dispatch) {
  DispatchResult result;
  result.message = check(dispatch);
  if (!result.message.empty()) return result;

  // Buffers past those that are bound are read by nobody, but a reference may be formed to one.
  alignas(64) static char nothing[4096];
  Launch launch;
  uint64_t total = 1;
  for (int d = 0; d < 3; ++d) {
    const uint32_t size = dispatch.threads_per_threadgroup[d];
    launch.threads_per_threadgroup[d] = size;
    const uint64_t groups = dispatch.grid_in_threads
                                ? (uint64_t{dispatch.grid[d]} + size - 1) / size
                                : dispatch.grid[d];
    launch.threadgroups_per_grid[d] = static_cast<uint32_t>(groups);
    launch.threads_per_grid[d] =
        dispatch.grid_in_threads ? dispatch.grid[d] : static_cast<uint32_t>(groups * size);
    total *= groups;
  }
  for (uint32_t i = 0; i < kBufferSlots; ++i) {
    void* address = dispatch.buffers[i].address;
    launch.buffers[i] = address ? address : nothing;
  }

  AccessMap accesses(dispatch);
  std::atomic<uint64_t> next{0}, first_failure{UINT64_MAX};
  std::mutex mutex;
  Watchdog watchdog(dispatch);
  const auto work = [&] {
    Worker worker(dispatch, launch, accesses);
    watchdog.enter();
    for (uint64_t i; (i = next.fetch_add(1)) < total && i < first_failure.load();) {
      const uint32_t* groups = launch.threadgroups_per_grid;
      const uint32_t position[3] = {static_cast<uint32_t>(i % groups[0]),
                                    static_cast<uint32_t>(i / groups[0] % groups[1]),
                                    static_cast<uint32_t>(i / groups[0] / groups[1])};
      if (worker.run(position)) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      if (i < first_failure.load()) {  // that of the first threadgroup is told
        first_failure = i;
        result.message = worker.message();
        result.timed_out = worker.timed_out();
      }
      break;
    }
    watchdog.leave();
    const std::lock_guard<std::mutex> lock(mutex);
    add(result.counters, worker.counters());
  };
  const uint64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t workers =
      std::min<uint64_t>(dispatch.workers != 0 ? dispatch.workers : cores, total);
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < workers; ++i) helpers.emplace_back(work);
  if (total != 0) work();
  for (std::thread& helper : helpers) helper.join();
  accesses.count(&result.counters);
  result.ok = first_failure.load() == UINT64_MAX;
  return result;
}

}  // namespace softmetal
