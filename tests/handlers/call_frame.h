// A drawn call made as XLA makes it, between pages that nobody may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "drawn_call.h"

namespace jax_gluon::handlers {

struct Outcome {
  bool succeeded = false;
  std::string message;    // of the error that the handler returned
  std::string violation;  // what no call may do; empty where it did nothing of it
  uint64_t results = 0;   // a digest of them
};

// Where tasks run: a pool of threads, or the thread that schedules them.
class Pool {
 public:
  virtual ~Pool() = default;
  // Whether it takes the task.
  virtual bool schedule(void (*task)(void*), void* data) = 0;
};

// Told when a handler begins and ends, and when it is in a function that stands for XLA's.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void call_begins() = 0;
  virtual void call_ends() = 0;
  virtual void xla_begins() = 0;
  virtual void xla_ends() = 0;
};

// Forces the instruction set `number` of those that there are, for all threads.
void force_variant(size_t number);

// Runs the call, whose buffers fit; each thread has buffers of its own.
Outcome run(const DrawnCall& call, Pool* pool = nullptr, Observer* observer = nullptr);

}  // namespace jax_gluon::handlers
