// Names of matrix types, global and in metal. To be included by metal_matrix and by the strict
// check's types alone.
#pragma once

// clang-format off: a table
#define SOFTMETAL_NAME(T, C, R)              \
  using T##C##x##R = metal::matrix<T, C, R>; \
  namespace metal {                          \
  using ::T##C##x##R;                        \
  }
#define SOFTMETAL_NAMES(T)                                                       \
  SOFTMETAL_NAME(T, 2, 2) SOFTMETAL_NAME(T, 2, 3) SOFTMETAL_NAME(T, 2, 4)        \
  SOFTMETAL_NAME(T, 3, 2) SOFTMETAL_NAME(T, 3, 3) SOFTMETAL_NAME(T, 3, 4)        \
  SOFTMETAL_NAME(T, 4, 2) SOFTMETAL_NAME(T, 4, 3) SOFTMETAL_NAME(T, 4, 4)
SOFTMETAL_NAMES(half)
SOFTMETAL_NAMES(float)
SOFTMETAL_NAMES(bfloat)
// clang-format on
#undef SOFTMETAL_NAMES
#undef SOFTMETAL_NAME
