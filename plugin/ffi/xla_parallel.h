// Parallel on the thread pool that XLA lends a custom call.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "device.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gluon {

class XlaParallel : public Parallel {
 public:
  explicit XlaParallel(xla::ffi::ThreadPool pool) : pool_(pool) {}

  int64_t threads() const override { return std::max<int64_t>(1, pool_.num_threads()); }

  // Rethrows on the calling thread the first exception that a task throws; the other tasks still
  // run.
  void run(int64_t tasks, const std::function<void(int64_t)>& body) override {
    if (tasks <= 0) return;
    const int64_t helpers = std::min(tasks, threads()) - 1;
    if (helpers == 0) {
      for (int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    // Helpers share the state: one that starts after the call has returned finds every task claimed
    // and touches nothing else.
    auto state = std::make_shared<State>();
    state->tasks = tasks;
    state->body = &body;
    // Helpers already queued will call `body`, so leaving here is not an option when memory for the
    // next one runs out: those there are, and this thread, do the work.
    try {
      for (int64_t i = 0; i < helpers; ++i) {
        pool_.Schedule([state] { work(*state); });
      }
    } catch (const std::bad_alloc&) {  // NOLINT(bugprone-empty-catch): nothing is lost but speed
    }
    work(*state);
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done == tasks; });
    if (state->error) std::rethrow_exception(state->error);
  }

 private:
  struct State {
    int64_t tasks = 0;
    const std::function<void(int64_t)>* body = nullptr;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
    std::exception_ptr error;
  };

  static void work(State& state) {
    int64_t finished = 0;
    for (int64_t task; (task = state.next.fetch_add(1, std::memory_order_relaxed)) < state.tasks;
         ++finished) {
      try {
        (*state.body)(task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(state.mutex);
        if (!state.error) state.error = std::current_exception();
      }
    }
    if (finished == 0) return;
    const std::lock_guard<std::mutex> lock(state.mutex);
    state.done += finished;
    if (state.done == state.tasks) state.all_done.notify_all();
  }

  xla::ffi::ThreadPool pool_;
};

}  // namespace jax_gluon
