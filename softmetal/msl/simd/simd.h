// The vector types that headers shared between kernels and host programs use.
#pragma once

#define SOFTMETAL_SIMD_VECTOR(prefix, T, N)                \
  using vector_##prefix##N = metal::vec<T, N>;             \
  using simd_##prefix##N = metal::vec<T, N>;               \
  using simd_packed_##prefix##N = metal::packed_vec<T, N>; \
  namespace simd {                                         \
  using prefix##N = metal::vec<T, N>;                      \
  using packed_##prefix##N = metal::packed_vec<T, N>;      \
  }
#define SOFTMETAL_SIMD_VECTORS(prefix, T) \
  SOFTMETAL_SIMD_VECTOR(prefix, T, 2)     \
  SOFTMETAL_SIMD_VECTOR(prefix, T, 3)     \
  SOFTMETAL_SIMD_VECTOR(prefix, T, 4)
SOFTMETAL_SIMD_VECTORS(char, char)
SOFTMETAL_SIMD_VECTORS(uchar, uchar)
SOFTMETAL_SIMD_VECTORS(short, short)
SOFTMETAL_SIMD_VECTORS(ushort, ushort)
SOFTMETAL_SIMD_VECTORS(int, int)
SOFTMETAL_SIMD_VECTORS(uint, uint)
SOFTMETAL_SIMD_VECTORS(long, long)
SOFTMETAL_SIMD_VECTORS(ulong, ulong)
SOFTMETAL_SIMD_VECTORS(half, half)
SOFTMETAL_SIMD_VECTORS(float, float)
#undef SOFTMETAL_SIMD_VECTORS
#undef SOFTMETAL_SIMD_VECTOR

#define SOFTMETAL_SIMD_MATRIX(T, C, R)                \
  using matrix_##T##C##x##R = metal::matrix<T, C, R>; \
  using simd_##T##C##x##R = metal::matrix<T, C, R>;   \
  namespace simd {                                    \
  using T##C##x##R = metal::matrix<T, C, R>;          \
  }
// clang-format off
#define SOFTMETAL_SIMD_MATRICES(T) \
  SOFTMETAL_SIMD_MATRIX(T, 2, 2) SOFTMETAL_SIMD_MATRIX(T, 2, 3) SOFTMETAL_SIMD_MATRIX(T, 2, 4) \
  SOFTMETAL_SIMD_MATRIX(T, 3, 2) SOFTMETAL_SIMD_MATRIX(T, 3, 3) SOFTMETAL_SIMD_MATRIX(T, 3, 4) \
  SOFTMETAL_SIMD_MATRIX(T, 4, 2) SOFTMETAL_SIMD_MATRIX(T, 4, 3) SOFTMETAL_SIMD_MATRIX(T, 4, 4)
// clang-format on
SOFTMETAL_SIMD_MATRICES(half)
SOFTMETAL_SIMD_MATRICES(float)
#undef SOFTMETAL_SIMD_MATRICES
#undef SOFTMETAL_SIMD_MATRIX
