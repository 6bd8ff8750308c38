// What the rewriter's output is made of: how a thread's values become a kernel's arguments, and how
// kernels, function constants and threadgroup variables meet the executor. Included after
// metal_stdlib.
#pragma once

#include "softmetal/image.h"

namespace softmetal {

// The type of parameter I of a pointer to function.
template <class Function, unsigned I>
struct ParameterOf;
template <class... P, unsigned I>
struct ParameterOf<void (*)(P...), I> {
  using type = __type_pack_element<I, P...>;
};
template <class Function, unsigned I>
using Parameter = typename ParameterOf<Function, I>::type;

template <class T>
struct Pointee {
  using type = T;
  static constexpr bool is_reference = false;
};
template <class T>
struct Pointee<T*> {
  using type = T;
  static constexpr bool is_reference = false;
};
template <class T>
struct Pointee<T&> {
  using type = T;
  static constexpr bool is_reference = true;
};

template <class T>
constexpr uint32_t size_or_0() {
  if constexpr (requires { sizeof(T); }) {
    return sizeof(T);
  } else {
    return 0;
  }
}
template <class T>
constexpr uint32_t alignment_or_1() {
  if constexpr (requires { alignof(T); }) {
    return alignof(T);
  } else {
    return 1;
  }
}

template <class P>
Argument argument(const char* name, const char* type, ArgumentKind kind, AddressSpace space,
                  unsigned index, bool is_writable, bool (*is_enabled)()) {
  using T = typename Pointee<P>::type;
  return {name,
          type,
          kind,
          space,
          static_cast<uint8_t>(index < 255 ? index : 255),
          Pointee<P>::is_reference,
          is_writable,
          size_or_0<T>(),
          alignment_or_1<T>(),
          is_enabled};
}

// A value of the thread, as many components as the parameter has.
template <class T>
T value_of(const Thread* t, ArgumentKind kind) {
  const Launch* launch = t->launch;
  uint32_t one[3] = {0, 0, 0};
  const uint32_t* v = one;
  switch (kind) {
    case ArgumentKind::kThreadPositionInGrid:
      v = t->thread_position_in_grid;
      break;
    case ArgumentKind::kThreadPositionInThreadgroup:
      v = t->thread_position_in_threadgroup;
      break;
    case ArgumentKind::kThreadIndexInThreadgroup:
      one[0] = t->thread_index_in_threadgroup;
      break;
    case ArgumentKind::kThreadgroupPositionInGrid:
      v = t->threadgroup_position_in_grid;
      break;
    case ArgumentKind::kThreadsPerThreadgroup:
      v = t->actual_threads_per_threadgroup;
      break;
    case ArgumentKind::kDispatchThreadsPerThreadgroup:
      v = launch->threads_per_threadgroup;
      break;
    case ArgumentKind::kThreadgroupsPerGrid:
      v = launch->threadgroups_per_grid;
      break;
    case ArgumentKind::kThreadsPerGrid:
    case ArgumentKind::kGridSize:
      v = launch->threads_per_grid;
      break;
    case ArgumentKind::kThreadIndexInSimdgroup:
      one[0] = t->thread_index_in_simdgroup;
      break;
    case ArgumentKind::kSimdgroupIndexInThreadgroup:
      one[0] = t->simdgroup_index_in_threadgroup;
      break;
    case ArgumentKind::kSimdgroupsPerThreadgroup:
      one[0] = t->simdgroups_per_threadgroup;
      break;
    case ArgumentKind::kDispatchSimdgroupsPerThreadgroup:
      one[0] = (launch->threads_per_threadgroup[0] * launch->threads_per_threadgroup[1] *
                    launch->threads_per_threadgroup[2] +
                kSimdgroupWidth - 1) /
               kSimdgroupWidth;
      break;
    case ArgumentKind::kThreadsPerSimdgroup:
      one[0] = kSimdgroupWidth;
      break;
    case ArgumentKind::kThreadIndexInQuadgroup:
      one[0] = t->thread_index_in_threadgroup % 4;
      break;
    case ArgumentKind::kQuadgroupIndexInThreadgroup:
      one[0] = t->thread_index_in_threadgroup / 4;
      break;
    case ArgumentKind::kQuadgroupsPerThreadgroup:
    case ArgumentKind::kDispatchQuadgroupsPerThreadgroup:
      one[0] = (t->actual_threads_per_threadgroup[0] * t->actual_threads_per_threadgroup[1] *
                    t->actual_threads_per_threadgroup[2] +
                3) /
               4;
      break;
    default:  // kGridOrigin is 0
      break;
  }
  if constexpr (kWidth<T> == 0) {
    return static_cast<T>(v[0]);
  } else {
    T out;
    for (int i = 0; i < kWidth<T>; ++i) out[i] = v[i];
    return out;
  }
}

template <class P>
struct Bind {
  static P get(const Thread* t, const Argument& a) { return value_of<P>(t, a.kind); }
};
template <class T>
struct Bind<T*> {
  static T* get(const Thread* t, const Argument& a) {
    void* address = a.kind == ArgumentKind::kThreadgroup ? t->threadgroup_memory[a.index]
                                                         : t->launch->buffers[a.index];
    return static_cast<T*>(address);
  }
};
template <class T>
struct Bind<T&> {
  static T& get(const Thread* t, const Argument& a) { return *Bind<T*>::get(t, a); }
};
template <class T, T... I>
struct Sequence {};

template <auto kFunction, const Argument* kArguments>
void entry(const Thread* t) {
  const auto call = [t]<class... P, unsigned... I>(void (*)(P...), Sequence<unsigned, I...>) {
    kFunction(Bind<P>::get(t, kArguments[I])...);
  };
  const auto all = [&]<class... P>(void (*f)(P...)) {
    call(f, __make_integer_seq<Sequence, unsigned, sizeof...(P)>());
  };
  all(kFunction);
}

struct Registration {
  explicit Registration(const Kernel& kernel) : kernel_(kernel) {
    softmetal_register_kernel(&kernel_);
  }
  Kernel kernel_;
};

template <class T>
T function_constant(uint32_t index, const char* name, const char* type, bool* is_defined) {
  T value{};
  *is_defined = softmetal_function_constant(index, name, type, sizeof(T), &value);
  return value;
}

// What a kernel's body declares is known without running it: naming `is_declared` of a variable has
// the image's initialisation add it up.
template <auto kFunction>
inline uint32_t static_threadgroup_bytes = 0;
template <auto kFunction, const char* kId, uint32_t kSize>
struct StaticVariable {
  static inline const bool is_declared = (static_threadgroup_bytes<kFunction> += kSize) != 0;
};

template <class T>
T& threadgroup_variable(const void* id, const char* name, uint32_t alignment = alignof(T)) {
  return *static_cast<T*>(softmetal_threadgroup_variable(
      id, name, sizeof(T), alignment < alignof(T) ? alignof(T) : alignment));
}

}  // namespace softmetal
