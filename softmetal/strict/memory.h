// Atomics, barriers, what the rewriter puts for threadgroup variables and function constants,
// logging.
#pragma once

namespace metal {

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};
enum memory_scope { memory_scope_simdgroup, memory_scope_threadgroup, memory_scope_device };

template <typename T>
struct atomic {
  static_assert(sizeof(T) <= 8 && __is_trivially_copyable(T), "no atomic of this type");
  alignas(sizeof(T) < 4 ? 4 : sizeof(T)) T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;
using atomic_long = atomic<long>;
using atomic_ulong = atomic<ulong>;

#define SOFTMETAL_ATOMICS_IN(space)                                                      \
  template <typename T, typename U>                                                      \
  void atomic_store_explicit(volatile space atomic<T>*, U, memory_order);                \
  template <typename T>                                                                  \
  T atomic_load_explicit(const volatile space atomic<T>*, memory_order);                 \
  template <typename T, typename U>                                                      \
  T atomic_exchange_explicit(volatile space atomic<T>*, U, memory_order);                \
  template <typename T, typename U>                                                      \
  bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, __private T*, U, \
                                             memory_order, memory_order);                \
  SOFTMETAL_FETCH(space, add)                                                            \
  SOFTMETAL_FETCH(space, sub)                                                            \
  SOFTMETAL_FETCH(space, min)                                                            \
  SOFTMETAL_FETCH(space, max)                                                            \
  SOFTMETAL_FETCH(space, and)                                                            \
  SOFTMETAL_FETCH(space, or)                                                             \
  SOFTMETAL_FETCH(space, xor)                                                            \
  template <typename U>                                                                  \
  void atomic_min_explicit(volatile space atomic<ulong>*, U, memory_order);              \
  template <typename U>                                                                  \
  void atomic_max_explicit(volatile space atomic<ulong>*, U, memory_order);
#define SOFTMETAL_FETCH(space, name) \
  template <typename T, typename U>  \
  T atomic_fetch_##name##_explicit(volatile space atomic<T>*, U, memory_order);
SOFTMETAL_ATOMICS_IN(__global)
SOFTMETAL_ATOMICS_IN(__local)
#undef SOFTMETAL_FETCH
#undef SOFTMETAL_ATOMICS_IN

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}
constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) & static_cast<uint>(b));
}
constexpr mem_flags operator|=(mem_flags& a, mem_flags b) { return a = a | b; }
void threadgroup_barrier(mem_flags, memory_scope = memory_scope_threadgroup);
void simdgroup_barrier(mem_flags, memory_scope = memory_scope_simdgroup);
void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device);

enum os_log_type {
  os_log_type_default,
  os_log_type_info,
  os_log_type_debug,
  os_log_type_error,
  os_log_type_fault
};
class os_log {
 public:
  constexpr os_log() = default;
  constexpr os_log(const __constant char*, const __constant char*) {}
  constexpr os_log(const __constant char*, const __constant char*) __constant {}
#define SOFTMETAL_LOG(name, ...)                                \
  template <typename... Args>                                   \
  void name(__VA_ARGS__ const __constant char*, Args...) const; \
  template <typename... Args>                                   \
  void name(__VA_ARGS__ const __constant char*, Args...) const __constant;
  SOFTMETAL_LOG(log)
  SOFTMETAL_LOG(log_debug)
  SOFTMETAL_LOG(log_error)
  SOFTMETAL_LOG(log_fault)
  SOFTMETAL_LOG(log_info)
  SOFTMETAL_LOG(log_with_type, os_log_type, )
#undef SOFTMETAL_LOG
};
extern __constant os_log os_log_default;

}  // namespace metal

#ifndef assert
#define assert(condition) static_cast<void>(condition)
#endif

namespace softmetal {

__constant constexpr uint kSimdgroupWidth = 32;

template <typename T>
__local T& threadgroup_variable();

// What the check puts around expressions that C++ for OpenCL would not take, see
// compiler/strict_check.cc.
template <typename T>
Bare<T> copied(T&&);
template <typename T>
__private Bare<T>& stored(T&&);
template <typename T>
long number(T&&);

}  // namespace softmetal
