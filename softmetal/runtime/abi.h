// Layout of what clang emits for `-fobjc-runtime=macosx`, and the runtime's own state of a class.
#pragma once

#include <objc/message.h>
#include <objc/runtime.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

struct objc_method {
  SEL name;
  const char* types;
  IMP implementation;
};

struct objc_ivar {
#if defined(__x86_64__)
  using Offset = int64_t;
#else
  using Offset = int32_t;
#endif
  Offset* offset;
  const char* name;
  const char* type;
  uint32_t alignment_log2;
  uint32_t size;
};

namespace softmetal::objc {

template <typename T>
struct List {
  uint32_t entry_size;
  uint32_t count;
  T* begin() const { return reinterpret_cast<T*>(const_cast<List*>(this) + 1); }
  T* end() const { return begin() + count; }
};
using MethodList = List<objc_method>;
using IvarList = List<objc_ivar>;

struct ProtocolData;
struct ProtocolList {
  uint64_t count;
  ProtocolData** begin() const {
    return reinterpret_cast<ProtocolData**>(const_cast<ProtocolList*>(this) + 1);
  }
  ProtocolData** end() const { return begin() + count; }
};

struct ProtocolData {
  Class isa;
  const char* name;
  const ProtocolList* protocols;
  const MethodList* instance_methods;
  const MethodList* class_methods;
  const MethodList* optional_instance_methods;
  const MethodList* optional_class_methods;
  const void* properties;
  uint32_t size;
  uint32_t flags;
};

struct CategoryData {
  const char* name;
  Class cls;
  const MethodList* instance_methods;
  const MethodList* class_methods;
  const ProtocolList* protocols;
};

enum ClassFlags : uint32_t { kMetaclass = 1, kRootClass = 2 };

struct ClassData {
  uint32_t flags;
  uint32_t instance_start;
  uint32_t instance_size;
  const void* ivar_layout;
  const char* name;
  const MethodList* methods;
  const ProtocolList* protocols;
  const IvarList* ivars;
  const void* weak_ivar_layout;
  const void* properties;
};

// Open addressing with linear probing. Read without a lock, by assembly too (message_send.cc);
// entries only ever appear, and a table that is full is replaced. Ends with an empty entry.
struct MethodCache {
  struct Entry {
    std::atomic<SEL> selector;
    std::atomic<IMP> implementation;
  };
  uint64_t mask;
  uint64_t used;
  Entry entries[1];
};

struct ClassState {
  Class class_object;                      // of a metaclass: its class
  std::vector<const MethodList*> methods;  // categories first, the newest in front
  std::vector<const ProtocolList*> protocols;
  std::vector<Class> subclasses;
  uint32_t instance_size;
  bool custom_reference_counting;  // overrides -retain or -release, or is a metaclass
  IMP cxx_construct, cxx_destruct;
  std::atomic<bool> initialized;  // of a metaclass unused
};

}  // namespace softmetal::objc

struct objc_class : objc_object {
  Class superclass;
  std::atomic<softmetal::objc::MethodCache*> cache;
  softmetal::objc::ClassState* state;  // clang leaves this word free
  softmetal::objc::ClassData* data;

  bool is_metaclass() const { return data->flags & softmetal::objc::kMetaclass; }
};

namespace softmetal::objc {

// Guards classes, categories, selectors and the growth of caches.
std::recursive_mutex& registry_mutex();

objc_method* find_method(Class cls, SEL selector);  // in `cls` and above; caller holds the mutex
IMP lookup(Class cls, SEL selector);                // null where there is none
void flush_caches(Class cls);                       // of `cls` and below
void realize(Class cls);
void add_class(Class cls);
Class add_methods(Class cls, const MethodList* methods);

template <typename Result = id, typename... Arguments>
Result send(id receiver, SEL selector, Arguments... arguments) {
  return reinterpret_cast<Result (*)(id, SEL, Arguments...)>(objc_msgSend)(receiver, selector,
                                                                           arguments...);
}

inline bool is_class(id object) { return object_getClass(object)->is_metaclass(); }

}  // namespace softmetal::objc
