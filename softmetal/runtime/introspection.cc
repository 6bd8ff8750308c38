// The rest of <objc/runtime.h>: what a class, a method or an instance variable is, and classes made
// while the program runs.
#include <cstdlib>
#include <cstring>

#include "softmetal/runtime/abi.h"

using namespace softmetal::objc;  // NOLINT: this file is the runtime's C interface

namespace {

const MethodList* single_method(SEL selector, IMP implementation, const char* types) {
  auto* methods = static_cast<MethodList*>(malloc(sizeof(MethodList) + sizeof(objc_method)));
  methods->entry_size = sizeof(objc_method);
  methods->count = 1;
  *methods->begin() = {selector, types ? strdup(types) : "", implementation};
  return methods;
}

Class new_class(const char* name, Class isa, Class superclass, uint32_t flags, uint32_t size) {
  auto* data = new ClassData{};
  data->flags = flags;
  data->instance_start = data->instance_size = size;
  data->name = name;
  auto* cls = new objc_class{};
  cls->isa = isa;
  cls->superclass = superclass;
  cls->data = data;
  return cls;
}

}  // namespace

extern "C" {
extern MethodCache _objc_empty_cache;

Class object_getClass(id object) { return object ? object->isa : nullptr; }
const char* object_getClassName(id object) { return class_getName(object_getClass(object)); }
bool object_isClass(id object) { return object && is_class(object); }
Class object_setClass(id object, Class cls) {
  Class before = object->isa;
  object->isa = cls;
  return before;
}

const char* class_getName(Class cls) { return cls ? cls->data->name : "nil"; }
Class class_getSuperclass(Class cls) { return cls ? cls->superclass : nullptr; }
bool class_isMetaClass(Class cls) { return cls && cls->is_metaclass(); }
size_t class_getInstanceSize(Class cls) { return cls ? cls->state->instance_size : 0; }

Method class_getClassMethod(Class cls, SEL selector) {
  return cls ? class_getInstanceMethod(cls->isa, selector) : nullptr;
}
IMP class_getMethodImplementation(Class cls, SEL selector) {
  return cls ? lookup(cls, selector) : nullptr;
}

Method* class_copyMethodList(Class cls, unsigned int* count) {
  std::vector<Method> all;
  if (cls) {
    std::lock_guard lock(registry_mutex());
    for (const MethodList* methods : cls->state->methods)
      for (objc_method& method : *methods) all.push_back(&method);
  }
  if (count) *count = static_cast<unsigned int>(all.size());
  if (all.empty()) return nullptr;
  auto* copy = static_cast<Method*>(malloc((all.size() + 1) * sizeof(Method)));
  memcpy(copy, all.data(), all.size() * sizeof(Method));
  copy[all.size()] = nullptr;
  return copy;
}

bool class_addMethod(Class cls, SEL selector, IMP implementation, const char* types) {
  std::lock_guard lock(registry_mutex());
  for (const MethodList* methods : cls->state->methods)
    for (objc_method& method : *methods)
      if (method.name == selector) return false;
  add_methods(cls, single_method(selector, implementation, types));
  return true;
}

IMP class_replaceMethod(Class cls, SEL selector, IMP implementation, const char* types) {
  std::lock_guard lock(registry_mutex());
  for (const MethodList* methods : cls->state->methods)
    for (objc_method& method : *methods)
      if (method.name == selector) return method_setImplementation(&method, implementation);
  add_methods(cls, single_method(selector, implementation, types));
  return nullptr;
}

bool class_addProtocol(Class cls, Protocol* protocol) {
  std::lock_guard lock(registry_mutex());
  if (class_conformsToProtocol(cls, protocol)) return false;
  auto* protocols =
      static_cast<ProtocolList*>(malloc(sizeof(ProtocolList) + sizeof(ProtocolData*)));
  protocols->count = 1;
  *protocols->begin() = reinterpret_cast<ProtocolData*>(protocol);
  cls->state->protocols.push_back(protocols);
  return true;
}

Class objc_allocateClassPair(Class superclass, const char* name, size_t) {
  if (objc_lookUpClass(name)) return nullptr;
  std::lock_guard lock(registry_mutex());
  const char* own_name = strdup(name);
  Class root_metaclass = superclass->isa;
  while (root_metaclass->superclass && root_metaclass->superclass->is_metaclass())
    root_metaclass = root_metaclass->superclass;
  Class metaclass =
      new_class(own_name, root_metaclass, superclass->isa, kMetaclass, sizeof(objc_class));
  Class cls = new_class(own_name, metaclass, superclass, 0, superclass->state->instance_size);
  metaclass->cache = cls->cache = &_objc_empty_cache;
  realize(cls);
  return cls;
}
void objc_registerClassPair(Class cls) {
  std::lock_guard lock(registry_mutex());
  add_class(cls);
}

SEL method_getName(Method method) { return method->name; }
const char* method_getTypeEncoding(Method method) { return method->types; }
IMP method_getImplementation(Method method) { return method->implementation; }

IMP method_setImplementation(Method method, IMP implementation) {
  std::lock_guard lock(registry_mutex());
  IMP before = method->implementation;
  method->implementation = implementation;
  // Whichever classes have it in their caches: all that descend from the root.
  Class root = objc_lookUpClass("NSObject");
  flush_caches(root);
  flush_caches(root->isa);
  return before;
}
void method_exchangeImplementations(Method first, Method second) {
  std::lock_guard lock(registry_mutex());
  IMP implementation = first->implementation;
  method_setImplementation(first, second->implementation);
  method_setImplementation(second, implementation);
}

Ivar class_getInstanceVariable(Class cls, const char* name) {
  for (; cls; cls = cls->superclass)
    if (const IvarList* ivars = cls->data->ivars)
      for (objc_ivar& ivar : *ivars)
        if (ivar.name && !strcmp(ivar.name, name)) return &ivar;
  return nullptr;
}
const char* ivar_getName(Ivar ivar) { return ivar->name; }
const char* ivar_getTypeEncoding(Ivar ivar) { return ivar->type; }
ptrdiff_t ivar_getOffset(Ivar ivar) { return *ivar->offset; }
id object_getIvar(id object, Ivar ivar) {
  return object ? *reinterpret_cast<id*>(reinterpret_cast<char*>(object) + *ivar->offset) : nullptr;
}

}  // extern "C"
