// Classes, categories, selectors and protocols of the loaded images, and method lookup.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "softmetal/runtime/abi.h"

extern "C" {
// What clang initialises the cache of a class with.
[[gnu::visibility("default")]] softmetal::objc::MethodCache _objc_empty_cache = {0, 0, {}};
extern struct objc_class protocol_class __asm__("OBJC_CLASS_$_Protocol");
}

namespace softmetal::objc {
namespace {

// Never destroyed: threads may send messages until the process has ended.
struct Registry {
  std::unordered_map<std::string_view, Class> classes;
  std::unordered_map<std::string_view, ProtocolData*> protocols;
  std::unordered_set<std::string_view> selectors;
  std::unordered_set<void**> images;
};

Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

SEL intern(const char* name) {
  // The text stays where it is: images are never unloaded as far as the runtime is concerned.
  return reinterpret_cast<SEL>(const_cast<char*>(registry().selectors.insert(name).first->data()));
}

void intern_names(const MethodList* methods) {
  if (!methods) return;
  for (objc_method& method : *methods) method.name = intern(sel_getName(method.name));
}

objc_method* find_in(const MethodList* methods, SEL selector) {
  for (objc_method& method : *methods)
    if (method.name == selector) return &method;
  return nullptr;
}

objc_method* find_own_method(Class cls, SEL selector) {
  for (const MethodList* methods : cls->state->methods)
    if (objc_method* method = find_in(methods, selector)) return method;
  return nullptr;
}

void update_reference_counting(Class cls) {
  ClassState& state = *cls->state;
  const bool is_root = !cls->superclass;
  state.custom_reference_counting =
      cls->is_metaclass() || (!is_root && (cls->superclass->state->custom_reference_counting ||
                                           find_own_method(cls, intern("retain")) ||
                                           find_own_method(cls, intern("release"))));
  for (Class subclass : state.subclasses) update_reference_counting(subclass);
}

// Instance variables follow those of the superclass, whose size is known only now.
void place_instance_variables(Class cls) {
  const ClassData& data = *cls->data;
  uint32_t shift = 0;
  if (cls->superclass && !cls->is_metaclass()) {
    const uint32_t end_of_super = cls->superclass->state->instance_size;
    if (end_of_super > data.instance_start) {
      uint32_t alignment = 8;
      if (data.ivars)
        for (const objc_ivar& ivar : *data.ivars)
          alignment = std::max(alignment, 1u << ivar.alignment_log2);
      shift = (end_of_super - data.instance_start + alignment - 1) / alignment * alignment;
      if (data.ivars)
        for (const objc_ivar& ivar : *data.ivars)
          if (ivar.offset) *ivar.offset += shift;
    }
  }
  cls->state->instance_size = data.instance_size + shift;
}

MethodCache* new_cache(uint64_t capacity) {
  // Half as many again, and one that stays empty, so that probing never wraps around.
  const size_t entries = capacity + capacity / 2 + 1;
  auto* cache = static_cast<MethodCache*>(
      calloc(1, sizeof(MethodCache) + entries * sizeof(MethodCache::Entry)));
  cache->mask = capacity - 1;
  return cache;
}

MethodCache::Entry* first_entry(MethodCache* cache, SEL selector) {
  return cache->entries + (reinterpret_cast<uintptr_t>(selector) >> 3 & cache->mask);
}

bool insert(MethodCache* cache, SEL selector, IMP implementation) {
  const uint64_t capacity = cache->mask + 1;
  if (cache->used * 2 >= capacity) return false;
  MethodCache::Entry* entry = first_entry(cache, selector);
  while (entry->selector.load(std::memory_order_relaxed)) ++entry;
  if (entry - cache->entries >= static_cast<ptrdiff_t>(capacity + capacity / 2)) return false;
  entry->implementation.store(implementation, std::memory_order_relaxed);
  entry->selector.store(selector, std::memory_order_release);
  ++cache->used;
  return true;
}

// A replaced table may still be read by another thread and is kept: tables double, so all of them
// together are at most twice the last one.
std::deque<MethodCache*>& retired_caches() {
  static std::deque<MethodCache*>& instance = *new std::deque<MethodCache*>;
  return instance;
}

void cache_method(Class cls, SEL selector, IMP implementation) {
  MethodCache* cache = cls->cache.load(std::memory_order_relaxed);
  uint64_t capacity = 16;
  if (cache != &_objc_empty_cache) {
    if (insert(cache, selector, implementation)) return;
    retired_caches().push_back(cache);
    capacity = (cache->mask + 1) * 2;
  }
  MethodCache* larger = new_cache(capacity);
  if (cache != &_objc_empty_cache)
    for (MethodCache::Entry* entry = cache->entries;
         entry < cache->entries + (cache->mask + 1) + (cache->mask + 1) / 2; ++entry)
      if (SEL known = entry->selector.load(std::memory_order_relaxed))
        insert(larger, known, entry->implementation.load(std::memory_order_relaxed));
  insert(larger, selector, implementation);
  cls->cache.store(larger, std::memory_order_release);
}

void initialize(Class cls) {
  if (cls->superclass) initialize(cls->superclass);
  ClassState& state = *cls->state;
  if (state.initialized.load(std::memory_order_acquire)) return;
  static std::recursive_mutex& mutex = *new std::recursive_mutex;
  static thread_local std::vector<Class> running;
  if (std::find(running.begin(), running.end(), cls) != running.end()) return;
  std::lock_guard lock(mutex);
  if (state.initialized.load(std::memory_order_acquire)) return;
  IMP method;
  {
    std::lock_guard registry_lock(registry_mutex());
    objc_method* found = find_method(cls->isa, intern("initialize"));
    method = found ? found->implementation : nullptr;
  }
  running.push_back(cls);
  if (method) reinterpret_cast<void (*)(Class, SEL)>(method)(cls, sel_registerName("initialize"));
  running.pop_back();
  state.initialized.store(true, std::memory_order_release);
}

void attach(Class cls, const MethodList* methods, const ProtocolList* protocols) {
  ClassState& state = *cls->state;
  if (methods) {
    intern_names(methods);
    state.methods.insert(state.methods.begin(), methods);
  }
  if (protocols) state.protocols.push_back(protocols);
  update_reference_counting(cls);
  flush_caches(cls);
}

bool conforms(const ProtocolList* protocols, std::string_view name) {
  if (!protocols) return false;
  return std::any_of(protocols->begin(), protocols->end(), [&](const ProtocolData* protocol) {
    return protocol->name == name || conforms(protocol->protocols, name);
  });
}

void send_load(Class cls, const MethodList* methods) {
  if (!methods) return;
  if (objc_method* method = find_in(methods, sel_registerName("load")))
    reinterpret_cast<void (*)(Class, SEL)>(method->implementation)(cls, method->name);
}

}  // namespace

std::recursive_mutex& registry_mutex() {
  static std::recursive_mutex& instance = *new std::recursive_mutex;
  return instance;
}

objc_method* find_method(Class cls, SEL selector) {
  for (; cls; cls = cls->superclass)
    if (objc_method* method = find_own_method(cls, selector)) return method;
  return nullptr;
}

IMP lookup(Class cls, SEL selector) {
  MethodCache* cache = cls->cache.load(std::memory_order_acquire);
  for (MethodCache::Entry* entry = first_entry(cache, selector);; ++entry) {
    const SEL known = entry->selector.load(std::memory_order_acquire);
    if (known == selector) return entry->implementation.load(std::memory_order_relaxed);
    if (!known) break;
  }
  Class class_object = cls->state->class_object;
  initialize(class_object);
  std::lock_guard lock(registry_mutex());
  objc_method* method = find_method(cls, selector);
  if (!method) return nullptr;
  // Not while +initialize runs: other threads have to come by here and wait.
  if (class_object->state->initialized.load(std::memory_order_acquire))
    cache_method(cls, selector, method->implementation);
  return method->implementation;
}

void flush_caches(Class cls) {
  MethodCache* cache = cls->cache.exchange(&_objc_empty_cache);
  if (cache != &_objc_empty_cache) retired_caches().push_back(cache);
  for (Class subclass : cls->state->subclasses) flush_caches(subclass);
}

void realize(Class cls) {
  if (cls->state) return;
  if (cls->superclass) realize(cls->superclass);
  auto* state = new ClassState{};
  cls->state = state;
  state->class_object = cls;
  if (cls->data->methods) {
    intern_names(cls->data->methods);
    state->methods.push_back(cls->data->methods);
  }
  if (cls->data->protocols) state->protocols.push_back(cls->data->protocols);
  if (cls->superclass) cls->superclass->state->subclasses.push_back(cls);
  for (const char* name : {".cxx_construct", ".cxx_destruct"})
    if (objc_method* method = find_own_method(cls, intern(name)))
      (name[5] == 'c' ? state->cxx_construct : state->cxx_destruct) = method->implementation;
  place_instance_variables(cls);
  update_reference_counting(cls);
  if (!cls->is_metaclass()) {
    realize(cls->isa);
    cls->isa->state->class_object = cls;
  }
}

void add_class(Class cls) {
  realize(cls);
  if (!registry().classes.emplace(cls->data->name, cls).second)
    fprintf(stderr, "objc: class %s is implemented more than once; which is used is undefined\n",
            cls->data->name);
}

Class add_methods(Class cls, const MethodList* methods) {
  std::lock_guard lock(registry_mutex());
  attach(cls, methods, nullptr);
  return cls;
}

}  // namespace softmetal::objc

using namespace softmetal::objc;  // NOLINT: the rest of this file is the runtime's C interface

extern "C" {

void softmetal_objc_register_image(const softmetal_objc_image* image) {
  std::vector<std::pair<Class, const MethodList*>> loads;
  {
    std::lock_guard lock(registry_mutex());
    void** const identity = image->selectors ? image->selectors : image->classes;
    if (!identity || !registry().images.insert(identity).second) return;
    for (void** selector = image->selectors; selector < image->selectors_end; ++selector)
      *selector = intern(static_cast<char*>(*selector));
    for (void** entry = image->protocols; entry < image->protocols_end; ++entry) {
      auto* protocol = static_cast<ProtocolData*>(*entry);
      protocol->isa = &protocol_class;
      registry().protocols.emplace(protocol->name, protocol);
    }
    for (void** entry = image->protocol_references; entry < image->protocol_references_end; ++entry)
      *entry = registry().protocols.at(static_cast<ProtocolData*>(*entry)->name);
    for (void** entry = image->classes; entry < image->classes_end; ++entry)
      add_class(static_cast<Class>(*entry));
    for (void** entry = image->categories; entry < image->categories_end; ++entry) {
      auto* category = static_cast<CategoryData*>(*entry);
      if (!category->cls) continue;
      attach(category->cls, category->instance_methods, category->protocols);
      attach(category->cls->isa, category->class_methods, nullptr);
    }
    for (void** entry = image->load_classes; entry < image->load_classes_end; ++entry)
      loads.emplace_back(static_cast<Class>(*entry),
                         static_cast<Class>(*entry)->isa->data->methods);
    for (void** entry = image->load_categories; entry < image->load_categories_end; ++entry) {
      auto* category = static_cast<CategoryData*>(*entry);
      loads.emplace_back(category->cls, category->class_methods);
    }
  }
  for (const auto& [cls, methods] : loads) send_load(cls, methods);
}

SEL sel_registerName(const char* name) {
  std::lock_guard lock(registry_mutex());
  auto& selectors = registry().selectors;
  auto known = selectors.find(name);
  if (known == selectors.end()) known = selectors.insert(strdup(name)).first;
  return reinterpret_cast<SEL>(const_cast<char*>(known->data()));
}
SEL sel_getUid(const char* name) { return sel_registerName(name); }
const char* sel_getName(SEL selector) { return reinterpret_cast<const char*>(selector); }
bool sel_isEqual(SEL first, SEL second) { return first == second; }

Class objc_lookUpClass(const char* name) {
  std::lock_guard lock(registry_mutex());
  auto found = registry().classes.find(name);
  return found == registry().classes.end() ? nullptr : found->second;
}
Class objc_getClass(const char* name) { return objc_lookUpClass(name); }
Class objc_getMetaClass(const char* name) {
  Class cls = objc_lookUpClass(name);
  return cls ? cls->isa : nullptr;
}
Class objc_getRequiredClass(const char* name) {
  if (Class cls = objc_lookUpClass(name)) return cls;
  fprintf(stderr, "objc: there is no class %s\n", name);
  abort();
}

Protocol* objc_getProtocol(const char* name) {
  std::lock_guard lock(registry_mutex());
  auto found = registry().protocols.find(name);
  return found == registry().protocols.end() ? nullptr : reinterpret_cast<Protocol*>(found->second);
}
const char* protocol_getName(Protocol* protocol) {
  return reinterpret_cast<ProtocolData*>(protocol)->name;
}
bool protocol_isEqual(Protocol* first, Protocol* second) {
  return first == second ||
         (first && second && !strcmp(protocol_getName(first), protocol_getName(second)));
}

bool class_conformsToProtocol(Class cls, Protocol* protocol) {
  if (!cls || !protocol) return false;
  std::lock_guard lock(registry_mutex());
  for (const ProtocolList* protocols : cls->state->protocols)
    if (conforms(protocols, protocol_getName(protocol))) return true;
  return false;
}

bool class_respondsToSelector(Class cls, SEL selector) { return cls && lookup(cls, selector); }

Method class_getInstanceMethod(Class cls, SEL selector) {
  if (!cls) return nullptr;
  std::lock_guard lock(registry_mutex());
  return find_method(cls, selector);
}

}  // extern "C"
