// Accessors that clang calls for @property, @synchronized, and mutation during fast enumeration.
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "softmetal/runtime/abi.h"

using namespace softmetal::objc;  // NOLINT: this file is the runtime's C interface

namespace {

std::mutex& property_mutex(const void* location) {
  static auto& mutexes = *new std::array<std::mutex, 32>;
  return mutexes[reinterpret_cast<uintptr_t>(location) >> 4 & 31];
}

enum class Copy { kNo, kImmutable, kMutable };

void set_property(id object, ptrdiff_t offset, id value, bool atomic, Copy copy) {
  id* location = reinterpret_cast<id*>(reinterpret_cast<char*>(object) + offset);
  if (copy == Copy::kNo)
    objc_retain(value);
  else
    value = send(value, sel_registerName(copy == Copy::kMutable ? "mutableCopy" : "copy"));
  id before;
  if (atomic) {
    std::lock_guard lock(property_mutex(location));
    before = std::exchange(*location, value);
  } else {
    before = std::exchange(*location, value);
  }
  objc_release(before);
}

struct Monitor {
  std::recursive_mutex mutex;
  int users = 0;
};
struct Monitors {
  std::mutex mutex;
  std::map<id, std::unique_ptr<Monitor>> in_use;
};
Monitors& monitors() {
  static auto& instance = *new Monitors;
  return instance;
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

id objc_getProperty(id object, SEL, ptrdiff_t offset, bool atomic) {
  id* location = reinterpret_cast<id*>(reinterpret_cast<char*>(object) + offset);
  if (!atomic) return *location;
  id value;
  {
    std::lock_guard lock(property_mutex(location));
    value = objc_retain(*location);
  }
  return objc_autorelease(value);
}

void objc_setProperty(id object, SEL, ptrdiff_t offset, id value, bool atomic, signed char copy) {
  set_property(object, offset, value, atomic,
               copy == 2 ? Copy::kMutable : (copy ? Copy::kImmutable : Copy::kNo));
}
void objc_setProperty_atomic(id object, SEL, id value, ptrdiff_t offset) {
  set_property(object, offset, value, true, Copy::kNo);
}
void objc_setProperty_nonatomic(id object, SEL, id value, ptrdiff_t offset) {
  set_property(object, offset, value, false, Copy::kNo);
}
void objc_setProperty_atomic_copy(id object, SEL, id value, ptrdiff_t offset) {
  set_property(object, offset, value, true, Copy::kImmutable);
}
void objc_setProperty_nonatomic_copy(id object, SEL, id value, ptrdiff_t offset) {
  set_property(object, offset, value, false, Copy::kImmutable);
}

// One of the two is the property; both are locked in the order of their locks.
void objc_copyStruct(void* to, const void* from, ptrdiff_t size, bool atomic, bool) {
  if (!atomic) {
    memmove(to, from, static_cast<size_t>(size));
    return;
  }
  std::mutex* first = &property_mutex(to);
  std::mutex* second = &property_mutex(from);
  if (first > second) std::swap(first, second);
  std::unique_lock first_lock(*first);
  std::unique_lock<std::mutex> second_lock;
  if (first != second) second_lock = std::unique_lock(*second);
  memmove(to, from, static_cast<size_t>(size));
}

void objc_copyCppObjectAtomic(void* to, const void* from, void (*copy)(void*, const void*)) {
  std::mutex* first = &property_mutex(to);
  std::mutex* second = &property_mutex(from);
  if (first > second) std::swap(first, second);
  std::unique_lock first_lock(*first);
  std::unique_lock<std::mutex> second_lock;
  if (first != second) second_lock = std::unique_lock(*second);
  copy(to, from);
}

int objc_sync_enter(id object) {
  if (!object) return 0;
  Monitor* monitor;
  {
    std::lock_guard lock(monitors().mutex);
    auto& entry = monitors().in_use[object];
    if (!entry) entry = std::make_unique<Monitor>();
    monitor = entry.get();
    ++monitor->users;
  }
  monitor->mutex.lock();
  return 0;
}

int objc_sync_exit(id object) {
  if (!object) return 0;
  std::lock_guard lock(monitors().mutex);
  auto entry = monitors().in_use.find(object);
  if (entry == monitors().in_use.end()) return -1;
  entry->second->mutex.unlock();
  if (--entry->second->users == 0) monitors().in_use.erase(entry);
  return 0;
}

void objc_enumerationMutation(id collection) {
  send<void>(collection, sel_registerName("softmetal_mutatedWhileEnumerated"));
}

#pragma GCC visibility pop
}  // extern "C"
