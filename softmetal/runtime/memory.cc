// Objects: allocation, reference counts, weak references, autorelease pools, and the entry points
// that automatic reference counting calls.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "softmetal/runtime/abi.h"
#include "softmetal/runtime/sanitizer.h"

namespace softmetal::objc {
namespace {

// In front of every object that class_createInstance made.
struct alignas(16) Header {
  std::atomic<int64_t> references;
  std::atomic<bool> has_weak_references;
  std::atomic<bool> has_associations;
};
static_assert(sizeof(Header) == 16);

Header& header(id object) { return reinterpret_cast<Header*>(object)[-1]; }

bool counts_itself(id object) { return object->isa->state->custom_reference_counting; }

struct Selectors {
  SEL retain = sel_registerName("retain");
  SEL release = sel_registerName("release");
  SEL autorelease = sel_registerName("autorelease");
  SEL dealloc = sel_registerName("dealloc");
  SEL alloc = sel_registerName("alloc");
  SEL alloc_with_zone = sel_registerName("allocWithZone:");
  SEL init = sel_registerName("init");
  SEL new_ = sel_registerName("new");
  SEL copy = sel_registerName("copy");
  SEL is_kind_of_class = sel_registerName("isKindOfClass:");
  SEL responds_to_selector = sel_registerName("respondsToSelector:");
};
const Selectors& selectors() {
  static const Selectors& instance = *new Selectors;
  return instance;
}

// --- Weak references: which locations point to an object ---

struct WeakTable {
  std::mutex mutex;
  std::unordered_map<id, std::vector<id*>> locations;
};
WeakTable& weak_table(id object) {
  static auto& tables = *new std::array<WeakTable, 16>;
  return tables[reinterpret_cast<uintptr_t>(object) >> 5 & 15];
}

bool try_retain(id object) {
  if (counts_itself(object)) return objc_retain(object);
  std::atomic<int64_t>& references = header(object).references;
  int64_t count = references.load(std::memory_order_relaxed);
  while (count > 0)
    if (references.compare_exchange_weak(count, count + 1, std::memory_order_acquire)) return true;
  return false;
}

void forget_weak(id* location) {
  while (id object = __atomic_load_n(location, __ATOMIC_ACQUIRE)) {
    WeakTable& table = weak_table(object);
    std::lock_guard lock(table.mutex);
    if (__atomic_load_n(location, __ATOMIC_RELAXED) != object) continue;
    if (auto known = table.locations.find(object); known != table.locations.end()) {
      std::erase(known->second, location);
      if (known->second.empty()) table.locations.erase(known);
    }
    __atomic_store_n(location, nullptr, __ATOMIC_RELEASE);
    return;
  }
}

void clear_weak_references(id object) {
  WeakTable& table = weak_table(object);
  std::lock_guard lock(table.mutex);
  auto known = table.locations.find(object);
  if (known == table.locations.end()) return;
  for (id* location : known->second) __atomic_store_n(location, nullptr, __ATOMIC_RELEASE);
  table.locations.erase(known);
}

// --- Associated objects ---

struct Association {
  objc_AssociationPolicy policy;
  id value;
};
struct AssociationTable {
  std::mutex mutex;
  std::unordered_map<id, std::unordered_map<const void*, Association>> objects;
};
AssociationTable& associations() {
  static auto& instance = *new AssociationTable;
  return instance;
}

// --- Autorelease pools ---

struct Pool {
  std::vector<id> objects;
  void drain(size_t to) {
    while (objects.size() > to) {
      id object = objects.back();
      objects.pop_back();
      objc_release(object);
    }
  }
  ~Pool() { drain(0); }
};
thread_local Pool pool;

void construct(id object, Class cls) {
  if (cls->superclass) construct(object, cls->superclass);
  if (IMP constructor = cls->state->cxx_construct)
    reinterpret_cast<id (*)(id, SEL)>(constructor)(object, nullptr);
}

}  // namespace
}  // namespace softmetal::objc

using namespace softmetal::objc;  // NOLINT: the rest of this file is the runtime's C interface

extern "C" {
#pragma GCC visibility push(default)

id class_createInstance(Class cls, size_t extra_bytes) {
  if (!cls) return nullptr;
  auto* memory =
      static_cast<Header*>(calloc(1, sizeof(Header) + cls->state->instance_size + extra_bytes));
  if (!memory) return nullptr;
  id object = reinterpret_cast<id>(memory + 1);
  header(object).references.store(1, std::memory_order_relaxed);
  object->isa = cls;
  construct(object, cls);
  return object;
}

void* objc_destructInstance(id object) {
  if (!object) return nullptr;
  for (Class cls = object->isa; cls; cls = cls->superclass)
    if (IMP destructor = cls->state->cxx_destruct)
      reinterpret_cast<void (*)(id, SEL)>(destructor)(object, nullptr);
  if (header(object).has_associations.load(std::memory_order_relaxed))
    objc_removeAssociatedObjects(object);
  if (header(object).has_weak_references.load(std::memory_order_relaxed))
    clear_weak_references(object);
  return object;
}

id object_dispose(id object) {
  if (!object) return nullptr;
  objc_destructInstance(object);
  free(&header(object));
  return nullptr;
}

// --- Counting. softmetal_objc_* is what NSObject's own methods do; objc_* honours overrides. ---

void softmetal_objc_retain(id object) {
  header(object).references.fetch_add(1, std::memory_order_relaxed);
}

void softmetal_objc_release(id object) {
  tsan_release(object);
  const int64_t before = header(object).references.fetch_sub(1, std::memory_order_acq_rel);
  if (before > 1) return;
  if (before < 1) {
    fprintf(stderr, "objc: %s %p was released more often than it was retained\n",
            object_getClassName(object), static_cast<void*>(object));
    abort();
  }
  tsan_acquire(object);
  // From here on weak references read nil.
  if (header(object).has_weak_references.load(std::memory_order_relaxed))
    clear_weak_references(object);
  send<void>(object, selectors().dealloc);
}

uint64_t softmetal_objc_retain_count(id object) {
  return static_cast<uint64_t>(header(object).references.load(std::memory_order_relaxed));
}

void softmetal_objc_autorelease(id object) { pool.objects.push_back(object); }

id objc_retain(id object) {
  if (!object) return object;
  if (counts_itself(object)) return is_class(object) ? object : send(object, selectors().retain);
  softmetal_objc_retain(object);
  return object;
}

void objc_release(id object) {
  if (!object) return;
  if (!counts_itself(object)) return softmetal_objc_release(object);
  if (!is_class(object)) send<void>(object, selectors().release);
}

id objc_autorelease(id object) {
  if (!object || is_class(object)) return object;
  if (counts_itself(object)) return send(object, selectors().autorelease);
  softmetal_objc_autorelease(object);
  return object;
}

id objc_retainAutorelease(id object) { return objc_autorelease(objc_retain(object)); }
id objc_autoreleaseReturnValue(id object) { return objc_autorelease(object); }
id objc_retainAutoreleaseReturnValue(id object) { return objc_retainAutorelease(object); }
id objc_retainAutoreleasedReturnValue(id object) { return objc_retain(object); }
id objc_claimAutoreleasedReturnValue(id object) { return objc_retain(object); }
id objc_unsafeClaimAutoreleasedReturnValue(id object) { return object; }

void objc_storeStrong(id* location, id object) {
  id before = *location;
  if (before == object) return;
  objc_retain(object);
  *location = object;
  objc_release(before);
}

void* objc_autoreleasePoolPush(void) { return reinterpret_cast<void*>(pool.objects.size() + 1); }
void objc_autoreleasePoolPop(void* token) { pool.drain(reinterpret_cast<size_t>(token) - 1); }

// --- Shorthands for common messages ---

id objc_alloc(Class cls) { return send(reinterpret_cast<id>(cls), selectors().alloc); }
id objc_allocWithZone(Class cls) {
  return send(reinterpret_cast<id>(cls), selectors().alloc_with_zone, static_cast<void*>(nullptr));
}
id objc_alloc_init(Class cls) { return send(objc_alloc(cls), selectors().init); }
id objc_opt_new(Class cls) { return send(reinterpret_cast<id>(cls), selectors().new_); }
id objc_opt_self(id object) { return object; }
Class objc_opt_class(id object) {
  if (!object) return nullptr;
  return is_class(object) ? reinterpret_cast<Class>(object) : object->isa;
}
bool objc_opt_isKindOfClass(id object, Class cls) {
  return object && send<bool>(object, selectors().is_kind_of_class, cls);
}
bool objc_opt_respondsToSelector(id object, SEL selector) {
  return object && send<bool>(object, selectors().responds_to_selector, selector);
}

// --- Weak references ---

id objc_initWeak(id* location, id object) {
  if (!object || counts_itself(object) || !try_retain(object)) {
    *location = object && counts_itself(object) ? object : nullptr;
    return *location;
  }
  {
    WeakTable& table = weak_table(object);
    std::lock_guard lock(table.mutex);
    header(object).has_weak_references.store(true, std::memory_order_relaxed);
    table.locations[object].push_back(location);
    __atomic_store_n(location, object, __ATOMIC_RELEASE);
  }
  objc_release(object);
  return object;
}

void objc_destroyWeak(id* location) {
  id object = __atomic_load_n(location, __ATOMIC_ACQUIRE);
  if (object) forget_weak(location);
}

id objc_storeWeak(id* location, id object) {
  objc_destroyWeak(location);
  return objc_initWeak(location, object);
}

id objc_loadWeakRetained(id* location) {
  for (;;) {
    id object = __atomic_load_n(location, __ATOMIC_ACQUIRE);
    if (!object) return nullptr;
    WeakTable& table = weak_table(object);
    std::lock_guard lock(table.mutex);
    // The object cannot be freed while its table is locked and names this location.
    if (__atomic_load_n(location, __ATOMIC_RELAXED) != object) continue;
    return try_retain(object) ? object : nullptr;
  }
}
id objc_loadWeak(id* location) { return objc_autorelease(objc_loadWeakRetained(location)); }

void objc_copyWeak(id* to, id* from) {
  id object = objc_loadWeakRetained(from);
  objc_initWeak(to, object);
  objc_release(object);
}
void objc_moveWeak(id* to, id* from) {
  objc_copyWeak(to, from);
  objc_destroyWeak(from);
}

// --- Associated objects ---

void objc_setAssociatedObject(id object, const void* key, id value, objc_AssociationPolicy policy) {
  if (!object) return;
  if ((policy & 3) == OBJC_ASSOCIATION_COPY_NONATOMIC)
    value = send(value, selectors().copy);
  else if (policy != OBJC_ASSOCIATION_ASSIGN)
    objc_retain(value);
  Association before = {OBJC_ASSOCIATION_ASSIGN, nullptr};
  {
    AssociationTable& table = associations();
    std::lock_guard lock(table.mutex);
    if (!is_class(object) && !counts_itself(object)) header(object).has_associations = true;
    auto& own = table.objects[object];
    if (auto known = own.find(key); known != own.end()) before = known->second;
    if (value)
      own[key] = {policy, value};
    else
      own.erase(key);
  }
  if (before.policy != OBJC_ASSOCIATION_ASSIGN) objc_release(before.value);
}

id objc_getAssociatedObject(id object, const void* key) {
  id value = nullptr;
  {
    AssociationTable& table = associations();
    std::lock_guard lock(table.mutex);
    auto own = table.objects.find(object);
    if (own == table.objects.end()) return nullptr;
    auto known = own->second.find(key);
    if (known == own->second.end()) return nullptr;
    value = known->second.value;
    if (known->second.policy == OBJC_ASSOCIATION_ASSIGN) return value;
    objc_retain(value);
  }
  return objc_autorelease(value);
}

void objc_removeAssociatedObjects(id object) {
  std::unordered_map<const void*, Association> own;
  {
    AssociationTable& table = associations();
    std::lock_guard lock(table.mutex);
    if (auto known = table.objects.find(object); known != table.objects.end()) {
      own = std::move(known->second);
      table.objects.erase(known);
    }
  }
  for (auto& [key, association] : own)
    if (association.policy != OBJC_ASSOCIATION_ASSIGN) objc_release(association.value);
}

#pragma GCC visibility pop
}  // extern "C"
