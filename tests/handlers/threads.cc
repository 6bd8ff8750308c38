// 16 threads that call the handlers at once, on one pool: their results are to be the bits of one
// thread's. For ThreadSanitizer, valgrind, and without either:
//   threads CALLS [SEED [THREADS]]
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "call_frame.h"
#include "guarded.h"

namespace jax_gluon::handlers {
namespace {

class ThreadsOfPool : public Pool {
 public:
  explicit ThreadsOfPool(int64_t count) {
    for (int64_t i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ThreadsOfPool(const ThreadsOfPool&) = delete;
  ThreadsOfPool& operator=(const ThreadsOfPool&) = delete;
  ~ThreadsOfPool() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_over_ = true;
    }
    changed_.notify_all();
    for (std::thread& each : threads_) each.join();
  }
  bool schedule(void (*task)(void*), void* data) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back(task, data);
    }
    changed_.notify_one();
    return true;
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return is_over_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto [task, data] = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task(data);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<void (*)(void*), void*>> tasks_;
  bool is_over_ = false;
  std::vector<std::thread> threads_;
};

std::vector<DrawnCall> draw_calls(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<DrawnCall> calls;
  while (calls.size() < count) {
    uint8_t bytes[256];
    for (uint8_t& each : bytes) each = static_cast<uint8_t>(random());
    DrawnCall call = draw(Bytes(bytes, sizeof bytes));
    if (call.is_sound && fits(call, GuardedMemory::kLargest)) calls.push_back(std::move(call));
  }
  return calls;
}

int run_all(size_t count, uint32_t seed, size_t threads) {
  const std::vector<DrawnCall> calls = draw_calls(count, seed);
  std::vector<Outcome> alone;
  size_t ran = 0;
  std::atomic<int64_t> failures{0};
  for (const DrawnCall& each : calls) {
    alone.push_back(run(each));
    ran += alone.back().succeeded;
    if (!alone.back().violation.empty()) ++failures;
  }
  ThreadsOfPool pool(3);
  std::vector<std::thread> callers;
  for (size_t thread = 0; thread < threads; ++thread) {
    callers.emplace_back([&, thread] {
      for (size_t i = 0; i < calls.size(); ++i) {
        const size_t at = (i + thread * calls.size() / threads) % calls.size();
        DrawnCall call = calls[at];
        call.threads = 4;
        const Outcome outcome = run(call, &pool);
        const bool is_same = outcome.succeeded == alone[at].succeeded &&
                             (!outcome.succeeded || outcome.results == alone[at].results);
        if (is_same && outcome.violation.empty()) continue;
        ++failures;
        std::printf("call %zu of seed %u: other results %s\n", at, seed, outcome.violation.c_str());
      }
    });
  }
  for (std::thread& each : callers) each.join();
  std::printf("%zu calls, of which %zu ran, by %zu threads each: %lld failures\n", calls.size(),
              ran, threads, static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_gluon::handlers

int main(int count, char** arguments) {
  const auto number = [&](int at, long other) {
    return count > at ? std::atol(arguments[at]) : other;
  };
  return jax_gluon::handlers::run_all(static_cast<size_t>(number(1, 200)),
                                      static_cast<uint32_t>(number(2, 0)),
                                      static_cast<size_t>(number(3, 16)));
}
