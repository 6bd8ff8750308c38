// What kernels ask of the compiler, where it knows the words.
#pragma once

#include <type_traits>
#include <utility>

#if defined(__GNUC__)
#define JAX_GLUON_NOINLINE __attribute__((noinline))
#define JAX_GLUON_INLINE inline __attribute__((always_inline))
#define JAX_GLUON_UNROLL _Pragma("GCC unroll 16")
#define JAX_GLUON_UNROLL_FOUR _Pragma("GCC unroll 4")
#else
#define JAX_GLUON_NOINLINE
#define JAX_GLUON_INLINE inline
#define JAX_GLUON_UNROLL
#define JAX_GLUON_UNROLL_FOUR
#endif

namespace jax_gluon::cpu {
namespace {

template <class Body, int... kIndex>
JAX_GLUON_INLINE void repeat_each(const Body& body, std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>()), ...);
}

// body(0), ... body(kCount - 1), of constants that instructions can hold.
template <int kCount, class Body>
JAX_GLUON_INLINE void repeat(const Body& body) {
  repeat_each(body, std::make_integer_sequence<int, kCount>());
}

}  // namespace
}  // namespace jax_gluon::cpu
