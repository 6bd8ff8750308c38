// @throw, @try and @catch as C++ exceptions: the thrown object travels as a pointer whose type_info
// compares Objective-C classes. clang emits one such type_info per class that is caught.
#include <cxxabi.h>

#include <exception>
#include <typeinfo>

#include "softmetal/runtime/abi.h"

namespace softmetal::objc {

// Layout of what clang emits as OBJC_EHTYPE_$_<class>, with `objc_ehtype_vtable` below.
class ClassTypeInfo : public std::type_info {
 public:
  ClassTypeInfo(const char* name, Class cls) : std::type_info(name), class_(cls) {}
  ~ClassTypeInfo() override;
  bool __do_catch(const std::type_info* thrown, void** object, unsigned) const override;

  const Class class_;  // null: catches every object
};

ClassTypeInfo::~ClassTypeInfo() = default;

bool ClassTypeInfo::__do_catch(const std::type_info* thrown, void** object, unsigned) const {
  if (!dynamic_cast<const ClassTypeInfo*>(thrown)) return false;
  id exception = *static_cast<id*>(*object);
  bool matches = !class_;
  for (Class cls = exception->isa; cls && !matches; cls = cls->superclass) matches = cls == class_;
  if (matches) *object = exception;
  return matches;
}

}  // namespace softmetal::objc

// The first two words of a vtable are not part of what an object points to; clang adds them itself.
asm(R"(
.globl objc_ehtype_vtable
.type objc_ehtype_vtable, @object
.set objc_ehtype_vtable, _ZTVN9softmetal4objc13ClassTypeInfoE
)");

using softmetal::objc::ClassTypeInfo;

extern "C" {
#pragma GCC visibility push(default)

ClassTypeInfo OBJC_EHTYPE_id("id", nullptr);

// The tables are those of C++ exceptions.
asm(R"(
.globl __objc_personality_v0
.type __objc_personality_v0, @function
__objc_personality_v0:
)"
#if defined(__x86_64__)
    "  jmp __gxx_personality_v0@PLT\n"
#else
    "  b __gxx_personality_v0\n"
#endif
);

[[noreturn]] void objc_exception_throw(id exception) {
  void* memory = abi::__cxa_allocate_exception(sizeof(id));
  *static_cast<id*>(memory) = objc_retain(exception);
  static auto& types = *new std::vector<std::pair<Class, ClassTypeInfo*>>;
  ClassTypeInfo* type = nullptr;
  {
    std::lock_guard lock(softmetal::objc::registry_mutex());
    for (auto& [cls, known] : types)
      if (cls == exception->isa) type = known;
    if (!type) {
      type = new ClassTypeInfo(object_getClassName(exception), exception->isa);
      types.emplace_back(exception->isa, type);
    }
  }
  abi::__cxa_throw(memory, type, [](void* thrown) { objc_release(*static_cast<id*>(thrown)); });
}

[[noreturn]] void objc_exception_rethrow() { abi::__cxa_rethrow(); }
void* objc_begin_catch(void* exception) { return abi::__cxa_begin_catch(exception); }
void objc_end_catch() { abi::__cxa_end_catch(); }
[[noreturn]] void objc_terminate() { std::terminate(); }

#pragma GCC visibility pop
}  // extern "C"
