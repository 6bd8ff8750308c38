// Grand Central Dispatch: every queue that is in use has threads of its own, which end when it has
// been idle. A serial queue has one, a concurrent queue as many as there are processors.
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "softmetal/foundation/internal.h"

namespace {

using Clock = std::chrono::steady_clock;
using Work = std::function<void()>;

void run(const Work& work) {
  @autoreleasepool {
    work();
  }
}

// Shared by a queue and its threads, which may outlive it.
struct QueueState {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Work> pending;
  std::string label;
  size_t width = 1;
  size_t threads = 0;
  size_t running = 0;
  bool barrier_running = false;
};

Work as_barrier(std::shared_ptr<QueueState> state, Work work) {
  return [state = std::move(state), work = std::move(work)] {
    std::unique_lock lock(state->mutex);
    state->changed.wait(lock, [&] { return state->running == 1; });
    state->barrier_running = true;
    lock.unlock();
    work();
    lock.lock();
    state->barrier_running = false;
    state->changed.notify_all();
  };
}

thread_local const QueueState* current_queue = nullptr;

void serve(std::shared_ptr<QueueState> state) {
  current_queue = state.get();
  std::unique_lock lock(state->mutex);
  for (;;) {
    const bool found = state->changed.wait_for(lock, std::chrono::milliseconds(200), [&] {
      return !state->pending.empty() && !state->barrier_running;
    });
    if (!found) break;
    Work work = std::move(state->pending.front());
    state->pending.pop_front();
    ++state->running;
    lock.unlock();
    run(work);
    work = nullptr;
    lock.lock();
    --state->running;
    state->changed.notify_all();
  }
  --state->threads;
}

void enqueue(const std::shared_ptr<QueueState>& state, Work work) {
  std::lock_guard lock(state->mutex);
  state->pending.push_back(std::move(work));
  if (state->threads < state->width && state->pending.size() + state->running > state->threads) {
    ++state->threads;
    std::thread(serve, state).detach();
  }
  state->changed.notify_all();
}

// Absolute: nanoseconds of the monotonic clock.
Clock::time_point deadline(dispatch_time_t when) {
  if (when == DISPATCH_TIME_NOW) return Clock::now();
  return Clock::time_point(std::chrono::nanoseconds(when));
}

template <typename Predicate>
bool wait_until(std::condition_variable& condition, std::unique_lock<std::mutex>& lock,
                dispatch_time_t when, Predicate predicate) {
  if (when == DISPATCH_TIME_FOREVER) {
    condition.wait(lock, predicate);
    return true;
  }
  return condition.wait_until(lock, deadline(when), predicate);
}

}  // namespace

@interface OS_dispatch_queue : NSObject <OS_dispatch_queue> {
 @public
  std::shared_ptr<QueueState> _state;
}
@end
@implementation OS_dispatch_queue
@end

@interface OS_dispatch_semaphore : NSObject <OS_dispatch_semaphore> {
 @public
  std::mutex _mutex;
  std::condition_variable _changed;
  intptr_t _value;
}
@end
@implementation OS_dispatch_semaphore
@end

@interface OS_dispatch_group : NSObject <OS_dispatch_group> {
 @public
  std::mutex _mutex;
  std::condition_variable _changed;
  size_t _members;
  std::vector<std::pair<dispatch_queue_t, dispatch_block_t>> _notifications;
}
@end
@implementation OS_dispatch_group
@end

@interface OS_dispatch_data : NSData <OS_dispatch_data>
@end
@implementation OS_dispatch_data
@end

// --- Queues ---

namespace {

OS_dispatch_queue* make_queue(const char* label, size_t width) {
  OS_dispatch_queue* queue = [[OS_dispatch_queue alloc] init];
  queue->_state = std::make_shared<QueueState>();
  queue->_state->label = label ? label : "";
  queue->_state->width = width;
  return queue;
}

std::shared_ptr<QueueState> state_of(dispatch_queue_t queue) {
  return ((OS_dispatch_queue*)(queue ? queue : dispatch_get_global_queue(0, 0)))->_state;
}

void run_and_wait(const std::shared_ptr<QueueState>& state, const Work& work) {
  if (current_queue == state.get() && state->width == 1) {
    [NSException raise:NSInternalInconsistencyException
                format:@"dispatch_sync called on queue already owned by current thread"];
  }
  std::mutex mutex;
  std::condition_variable done;
  bool finished = false;
  enqueue(state, [&] {
    work();
    std::lock_guard lock(mutex);
    finished = true;
    done.notify_all();
  });
  std::unique_lock lock(mutex);
  done.wait(lock, [&] { return finished; });
}

}  // namespace

dispatch_queue_t dispatch_queue_create(const char* label, dispatch_queue_attr_t attributes) {
  const bool concurrent = (__bridge void*)attributes == &_dispatch_queue_attr_concurrent;
  return make_queue(label, concurrent ? std::max(2u, std::thread::hardware_concurrency()) : 1);
}
dispatch_queue_attr_t dispatch_queue_attr_make_with_qos_class(dispatch_queue_attr_t attributes,
                                                              dispatch_qos_class_t, int) {
  return attributes;
}
dispatch_queue_t dispatch_get_global_queue(intptr_t, uintptr_t) {
  static OS_dispatch_queue* queue =
      make_queue("com.apple.root.default-qos", std::max(4u, std::thread::hardware_concurrency()));
  return queue;
}
// Served by a thread of its own: programs without a run loop never return to the main thread.
dispatch_queue_t dispatch_get_main_queue(void) {
  static OS_dispatch_queue* queue = make_queue("com.apple.main-thread", 1);
  return queue;
}
void dispatch_main(void) {
  for (;;) pause();
}
const char* dispatch_queue_get_label(dispatch_queue_t queue) {
  return state_of(queue)->label.c_str();
}

void dispatch_async(dispatch_queue_t queue, dispatch_block_t block) {
  enqueue(state_of(queue), [block = [block copy]] { ((dispatch_block_t)block)(); });
}
void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block) {
  run_and_wait(state_of(queue), [block] { block(); });
}
void dispatch_barrier_async(dispatch_queue_t queue, dispatch_block_t block) {
  const auto state = state_of(queue);
  enqueue(state, as_barrier(state, [block = [block copy]] { ((dispatch_block_t)block)(); }));
}
void dispatch_barrier_sync(dispatch_queue_t queue, dispatch_block_t block) {
  const auto state = state_of(queue);
  run_and_wait(state, as_barrier(state, [block] { block(); }));
}
void dispatch_async_f(dispatch_queue_t queue, void* context, dispatch_function_t work) {
  enqueue(state_of(queue), [=] { work(context); });
}
void dispatch_sync_f(dispatch_queue_t queue, void* context, dispatch_function_t work) {
  run_and_wait(state_of(queue), [=] { work(context); });
}
void dispatch_after(dispatch_time_t when, dispatch_queue_t queue, dispatch_block_t block) {
  dispatch_block_t copy = [block copy];
  std::thread([=] {
    std::this_thread::sleep_until(deadline(when));
    dispatch_async(queue, copy);
  }).detach();
}

void dispatch_apply(size_t iterations, dispatch_queue_t queue, void (^block)(size_t)) {
  const auto state = state_of(queue);
  if (queue && state->width == 1) {
    run_and_wait(state, [=] {
      for (size_t i = 0; i < iterations; ++i) block(i);
    });
    return;
  }
  std::atomic<size_t> next{0};
  const auto take = [&] {
    for (size_t i; (i = next++) < iterations;) run([&] { block(i); });
  };
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < std::min<size_t>(iterations, std::thread::hardware_concurrency()); ++i)
    helpers.emplace_back(take);
  take();
  for (std::thread& helper : helpers) helper.join();
}

// --- Semaphores and groups ---

dispatch_semaphore_t dispatch_semaphore_create(intptr_t value) {
  OS_dispatch_semaphore* semaphore = [[OS_dispatch_semaphore alloc] init];
  semaphore->_value = value;
  return semaphore;
}
intptr_t dispatch_semaphore_wait(dispatch_semaphore_t object, dispatch_time_t timeout) {
  auto* semaphore = (OS_dispatch_semaphore*)object;
  std::unique_lock lock(semaphore->_mutex);
  if (!wait_until(semaphore->_changed, lock, timeout, [&] { return semaphore->_value > 0; }))
    return 1;
  --semaphore->_value;
  return 0;
}
intptr_t dispatch_semaphore_signal(dispatch_semaphore_t object) {
  auto* semaphore = (OS_dispatch_semaphore*)object;
  std::lock_guard lock(semaphore->_mutex);
  ++semaphore->_value;
  semaphore->_changed.notify_one();
  return 0;
}

dispatch_group_t dispatch_group_create(void) { return [[OS_dispatch_group alloc] init]; }
void dispatch_group_enter(dispatch_group_t object) {
  auto* group = (OS_dispatch_group*)object;
  std::lock_guard lock(group->_mutex);
  ++group->_members;
}
void dispatch_group_leave(dispatch_group_t object) {
  auto* group = (OS_dispatch_group*)object;
  decltype(group->_notifications) notifications;
  {
    std::lock_guard lock(group->_mutex);
    if (group->_members == 0)
      [NSException raise:NSInternalInconsistencyException
                  format:@"Unbalanced call to dispatch_group_leave()"];
    if (--group->_members) return;
    notifications.swap(group->_notifications);
    group->_changed.notify_all();
  }
  for (const auto& [queue, block] : notifications) dispatch_async(queue, block);
}
intptr_t dispatch_group_wait(dispatch_group_t object, dispatch_time_t timeout) {
  auto* group = (OS_dispatch_group*)object;
  std::unique_lock lock(group->_mutex);
  return wait_until(group->_changed, lock, timeout, [&] { return group->_members == 0; }) ? 0 : 1;
}
void dispatch_group_async(dispatch_group_t group, dispatch_queue_t queue, dispatch_block_t block) {
  dispatch_group_enter(group);
  dispatch_async(queue, ^{
    block();
    dispatch_group_leave(group);
  });
}
void dispatch_group_notify(dispatch_group_t object, dispatch_queue_t queue,
                           dispatch_block_t block) {
  auto* group = (OS_dispatch_group*)object;
  {
    std::lock_guard lock(group->_mutex);
    if (group->_members) {
      group->_notifications.emplace_back(queue, [block copy]);
      return;
    }
  }
  dispatch_async(queue, block);
}

// --- Once, time, data ---

void dispatch_once_f(dispatch_once_t* predicate, void* context, dispatch_function_t work) {
  dispatch_once(predicate, ^{
    work(context);
  });
}
void dispatch_once(dispatch_once_t* predicate, dispatch_block_t block) {
  if (__atomic_load_n(predicate, __ATOMIC_ACQUIRE) == ~dispatch_once_t{0}) return;
  static auto& mutex = *new std::recursive_mutex;
  std::lock_guard lock(mutex);
  if (*predicate) return;
  block();
  __atomic_store_n(predicate, ~dispatch_once_t{0}, __ATOMIC_RELEASE);
}

dispatch_time_t dispatch_time(dispatch_time_t when, int64_t nanoseconds) {
  if (when == DISPATCH_TIME_FOREVER) return when;
  const auto base = when == DISPATCH_TIME_NOW
                        ? static_cast<dispatch_time_t>(Clock::now().time_since_epoch().count())
                        : when;
  return base + static_cast<dispatch_time_t>(nanoseconds);
}
dispatch_time_t dispatch_walltime(const timespec* when, int64_t nanoseconds) {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  const timespec& start = when ? *when : now;
  return dispatch_time(DISPATCH_TIME_NOW,
                       (start.tv_sec - now.tv_sec) * static_cast<int64_t>(NSEC_PER_SEC) +
                           (start.tv_nsec - now.tv_nsec) + nanoseconds);
}

// Only their addresses matter.
const dispatch_block_t _dispatch_data_destructor_free = ^{
};
const dispatch_block_t _dispatch_data_destructor_none = ^{
  (void)0;
};

dispatch_data_t dispatch_data_create(const void* bytes, size_t size, dispatch_queue_t,
                                     dispatch_block_t destructor) {
  if (destructor == DISPATCH_DATA_DESTRUCTOR_DEFAULT)
    return [[OS_dispatch_data alloc] initWithBytes:bytes length:size];
  return [[OS_dispatch_data alloc] initWithBytesNoCopy:const_cast<void*>(bytes)
                                                length:size
                                           deallocator:^(void* memory, NSUInteger) {
                                             if (destructor == _dispatch_data_destructor_free)
                                               free(memory);
                                             else
                                               destructor();
                                           }];
}
dispatch_data_t dispatch_data_create_map(dispatch_data_t data, const void** bytes, size_t* size) {
  if (bytes) *bytes = ((OS_dispatch_data*)data).bytes;
  if (size) *size = ((OS_dispatch_data*)data).length;
  return data;
}
size_t dispatch_data_get_size(dispatch_data_t data) { return ((OS_dispatch_data*)data).length; }
