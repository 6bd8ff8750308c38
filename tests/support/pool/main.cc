// Parallel loops on a pool whose threads come late: every task runs once, an exception comes back,
// and a helper that starts after the loop's end touches nothing that is gone.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "ffi/xla_parallel.h"

namespace {

int failures = 0;
void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

void every_task_once(int64_t threads, int64_t tasks) {
  xla::ffi::Threads pool(threads);
  {
    std::vector<int> runs(static_cast<size_t>(tasks), 0);
    jax_gluon::XlaParallel parallel{xla::ffi::ThreadPool(&pool)};
    parallel.run(tasks, [&runs](int64_t task) { ++runs[static_cast<size_t>(task)]; });
    for (int count : runs) check(count == 1, "a task runs once");
  }
  pool.join();  // the loop, its body and its results are gone; some helpers start only now
}

void exceptions_come_back() {
  xla::ffi::Threads pool(4);
  jax_gluon::XlaParallel parallel{xla::ffi::ThreadPool(&pool)};
  std::atomic<int> others{0};
  std::string text;
  try {
    parallel.run(64, [&](int64_t task) {
      if (task == 5) throw std::runtime_error("task 5");
      ++others;
    });
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  check(text == "task 5", "the exception is that of the task");
  check(others == 63, "the other tasks run");
}

void without_memory_for_helpers() {
  xla::ffi::Threads pool(8, 2);
  jax_gluon::XlaParallel parallel{xla::ffi::ThreadPool(&pool)};
  std::atomic<int> runs{0};
  parallel.run(100, [&](int64_t) { ++runs; });
  check(runs == 100, "tasks run on the helpers that there are");
}

}  // namespace

int main() {
  for (int repeat = 0; repeat < 20; ++repeat) {
    for (int64_t tasks : {0, 1, 2, 7, 200}) every_task_once(6, tasks);
    every_task_once(1, 9);
  }
#if !defined(__SANITIZE_THREAD__)  // it does not see how libstdc++ counts references to exceptions
  exceptions_come_back();
#endif
  without_memory_for_helpers();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
