// A stand-in for XLA's thread pool. What is scheduled runs on threads that start early or late:
// some after the call that scheduled them has returned.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace xla::ffi {

struct Threads {
  explicit Threads(int64_t size, int64_t capacity = 1 << 20) : size(size), capacity(capacity) {}
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() { join(); }
  void join() {
    for (std::thread& thread : running) thread.join();
    running.clear();
  }
  int64_t size, capacity;
  std::vector<std::thread> running;
};

class ThreadPool {
 public:
  explicit ThreadPool(Threads* threads) : threads_(threads) {}
  int64_t num_threads() const { return threads_->size; }
  template <class Task>
  void Schedule(Task&& task) {
    const auto count = static_cast<int64_t>(threads_->running.size());
    if (count >= threads_->capacity) throw std::bad_alloc();
    const std::chrono::microseconds delay(count % 3 * 500);
    threads_->running.emplace_back([delay, task = std::function<void()>(task)] {
      std::this_thread::sleep_for(delay);
      task();
    });
  }

 private:
  Threads* threads_;
};

}  // namespace xla::ffi
