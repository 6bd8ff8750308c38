// What a custom call runs on: the CPU here; Metal implements the same interface.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "attention_call.h"
#include "kernels.h"

namespace jax_gluon {

// Threads lent by the caller (XLA's pool). `run(tasks, body)` calls body(task) for each task in
// [0, tasks), on the calling thread and on idle pool threads, and returns when all are done. It
// never waits for a pool thread that has not started, so calls made from the pool itself can't
// deadlock.
class Parallel {
 public:
  virtual ~Parallel() = default;
  virtual int64_t threads() const = 0;
  virtual void run(int64_t tasks, const std::function<void(int64_t)>& body) = 0;
};

// Empty on success, else what went wrong.
using Status = std::optional<std::string>;

// A pass takes a call whose kernel is among the offers for it, and says in `run` what ran.
class Device {
 public:
  virtual ~Device() = default;
  virtual Status forward(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) = 0;
  virtual Status backward(const AttentionBackwardCall& call, Parallel& parallel,
                          KernelRun& run) = 0;
  virtual Status backward_bias(const AttentionBackwardBiasCall& call, Parallel& parallel,
                               KernelRun& run) = 0;
  virtual Status tangent(const AttentionTangentCall& call, Parallel& parallel, KernelRun& run) = 0;
  virtual Status quantize(const QuantizeCall& call, Parallel& parallel) = 0;

  // The kernels for a call, of which everything but the data counts; by the rules that the passes
  // go by. Empty where the device can't run at all.
  virtual KernelOffers offers(const AttentionForwardCall& call) const = 0;
  virtual KernelOffers offers(const AttentionBackwardCall& call) const = 0;
  virtual KernelOffers offers(const AttentionBackwardBiasCall& call) const = 0;
};

// The native CPU kernels. Never null.
Device& cpu_device();

// Name of the instruction-set variant that cpu_device() runs: that of JAX_GLUON_CPU_ISA, else the
// best that this processor has. "unsupported" where the variable names none: every call then fails
// with a Status that says so. Read at every call.
std::string cpu_isa();
// Variants compiled in and supported by this processor, best first.
std::vector<std::string> cpu_isas_supported();

// Why the operating system refuses a variant that build and processor have; empty where it refuses
// none.
std::string cpu_isa_refusal();

// Scratch memory that is kept for later calls, in bytes, and the blocks of it that were made so
// far.
struct ScratchState {
  size_t kept_bytes, made_blocks;
};
ScratchState cpu_scratch_state();

}  // namespace jax_gluon
