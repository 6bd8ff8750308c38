// What a processor does to a kernel that goes wrong, as errors of its dispatch: wild pointers,
// division by zero, a stack that overflows, loops without an end. Not with AddressSanitizer or
// ThreadSanitizer, which have signal handlers of their own.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "softmetal/executor.h"

namespace softmetal {

class Worker;

// While it lives, signals of its thread are handled on a stack of their own, since a fiber's may be
// what is at fault.
class SignalStack {
 public:
  SignalStack();
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;
  ~SignalStack();

 private:
  void* memory_ = nullptr;
  stack_t before_ = {};
};

// Instructions from `begin` to `end`.
struct CodeRange {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t address) const { return address >= begin && address < end; }
};
// Those of the shared object that a function is in.
CodeRange code_around(const void* function);

// Interrupts the workers of a dispatch that has run for too long or is cancelled, again and again,
// until each is seen in its kernel's own code, where it can be stopped.
class Watchdog {
 public:
  explicit Watchdog(const Dispatch& dispatch);
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  ~Watchdog();

  // The calling thread runs threadgroups from now on, or no longer.
  void enter();
  void leave();

 private:
  void watch();
  bool is_over() const;

  const Dispatch& dispatch_;
  std::chrono::steady_clock::time_point deadline_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ends_ = false;
  std::vector<pthread_t> threads_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace softmetal
