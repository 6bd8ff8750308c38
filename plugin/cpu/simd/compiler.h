// What kernels ask of the compiler, where it knows the words.
#pragma once

#if defined(__GNUC__)
#define JAX_GLUON_NOINLINE __attribute__((noinline))
#define JAX_GLUON_INLINE inline __attribute__((always_inline))
#define JAX_GLUON_UNROLL _Pragma("GCC unroll 16")
#else
#define JAX_GLUON_NOINLINE
#define JAX_GLUON_INLINE inline
#define JAX_GLUON_UNROLL
#endif
