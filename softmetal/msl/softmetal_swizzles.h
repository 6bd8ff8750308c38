// Swizzles as properties: v.zyx is a real vec<T, 3>, costs no storage, and can be assigned to where
// its letters differ (put_zyx exists). To be included by metal_types alone.
//
// Each macro takes a swizzle's letters followed by the same letters as colours.
#pragma once

#ifndef SOFTMETAL_GETTER
#define SOFTMETAL_GETTER(N, name, ...) \
  SOFTMETAL_FUNC constexpr vec<T, N> name() const { return vec<T, N>(__VA_ARGS__); }
#endif

// clang-format off: tables
#define SOFTMETAL_GET_2(a, b, A, B)                                                 \
  SOFTMETAL_GETTER(2, get_##a##b, a, b)                                             \
  __declspec(property(get = get_##a##b, put = put_##a##b)) vec<T, 2> a##b;          \
  __declspec(property(get = get_##a##b, put = put_##a##b)) vec<T, 2> A##B;
#define SOFTMETAL_GET_3(a, b, c, A, B, C)                                                 \
  SOFTMETAL_GETTER(3, get_##a##b##c, a, b, c)                                             \
  __declspec(property(get = get_##a##b##c, put = put_##a##b##c)) vec<T, 3> a##b##c;       \
  __declspec(property(get = get_##a##b##c, put = put_##a##b##c)) vec<T, 3> A##B##C;
#define SOFTMETAL_GET_4(a, b, c, d, A, B, C, D)                                                 \
  SOFTMETAL_GETTER(4, get_##a##b##c##d, a, b, c, d)                                             \
  __declspec(property(get = get_##a##b##c##d, put = put_##a##b##c##d)) vec<T, 4> a##b##c##d;    \
  __declspec(property(get = get_##a##b##c##d, put = put_##a##b##c##d)) vec<T, 4> A##B##C##D;

#define SOFTMETAL_PUT_2(a, b)                                  \
  SOFTMETAL_FUNC constexpr vec<T, 2> put_##a##b(vec<T, 2> v) { \
    a = v.x;                                                   \
    b = v.y;                                                   \
    return v;                                                  \
  }
#define SOFTMETAL_PUT_3(a, b, c)                                  \
  SOFTMETAL_FUNC constexpr vec<T, 3> put_##a##b##c(vec<T, 3> v) { \
    a = v.x;                                                      \
    b = v.y;                                                      \
    c = v.z;                                                      \
    return v;                                                     \
  }
#define SOFTMETAL_PUT_4(a, b, c, d)                                  \
  SOFTMETAL_FUNC constexpr vec<T, 4> put_##a##b##c##d(vec<T, 4> v) { \
    a = v.x;                                                         \
    b = v.y;                                                         \
    c = v.z;                                                         \
    d = v.w;                                                         \
    return v;                                                        \
  }

// Reading: every sequence of letters. The parameters are letters and their colours, so named that
// no letter that is added here is taken for one of them.
#define SOFTMETAL_4_FROM_2(l1, l2, l3, c1, c2, c3) \
  SOFTMETAL_GET_4(l1, l2, l3, x, c1, c2, c3, r) SOFTMETAL_GET_4(l1, l2, l3, y, c1, c2, c3, g)
#define SOFTMETAL_4_FROM_3(l1, l2, l3, c1, c2, c3) \
  SOFTMETAL_4_FROM_2(l1, l2, l3, c1, c2, c3) SOFTMETAL_GET_4(l1, l2, l3, z, c1, c2, c3, b)
#define SOFTMETAL_4_FROM_4(l1, l2, l3, c1, c2, c3) \
  SOFTMETAL_4_FROM_3(l1, l2, l3, c1, c2, c3) SOFTMETAL_GET_4(l1, l2, l3, w, c1, c2, c3, a)

#define SOFTMETAL_3_WITH(M, l1, l2, l3, c1, c2, c3) \
  SOFTMETAL_GET_3(l1, l2, l3, c1, c2, c3) M(l1, l2, l3, c1, c2, c3)
#define SOFTMETAL_3_FROM_2(M, l1, l2, c1, c2) \
  SOFTMETAL_3_WITH(M, l1, l2, x, c1, c2, r) SOFTMETAL_3_WITH(M, l1, l2, y, c1, c2, g)
#define SOFTMETAL_3_FROM_3(M, l1, l2, c1, c2) \
  SOFTMETAL_3_FROM_2(M, l1, l2, c1, c2) SOFTMETAL_3_WITH(M, l1, l2, z, c1, c2, b)
#define SOFTMETAL_3_FROM_4(M, l1, l2, c1, c2) \
  SOFTMETAL_3_FROM_3(M, l1, l2, c1, c2) SOFTMETAL_3_WITH(M, l1, l2, w, c1, c2, a)

#define SOFTMETAL_2_OF_2(l1, l2, c1, c2) \
  SOFTMETAL_GET_2(l1, l2, c1, c2) SOFTMETAL_3_FROM_2(SOFTMETAL_4_FROM_2, l1, l2, c1, c2)
#define SOFTMETAL_2_OF_3(l1, l2, c1, c2) \
  SOFTMETAL_GET_2(l1, l2, c1, c2) SOFTMETAL_3_FROM_3(SOFTMETAL_4_FROM_3, l1, l2, c1, c2)
#define SOFTMETAL_2_OF_4(l1, l2, c1, c2) \
  SOFTMETAL_GET_2(l1, l2, c1, c2) SOFTMETAL_3_FROM_4(SOFTMETAL_4_FROM_4, l1, l2, c1, c2)

#define SOFTMETAL_1_OF_2(l1, c1) SOFTMETAL_2_OF_2(l1, x, c1, r) SOFTMETAL_2_OF_2(l1, y, c1, g)
#define SOFTMETAL_1_OF_3(l1, c1) \
  SOFTMETAL_2_OF_3(l1, x, c1, r) SOFTMETAL_2_OF_3(l1, y, c1, g) SOFTMETAL_2_OF_3(l1, z, c1, b)
#define SOFTMETAL_1_OF_4(l1, c1) \
  SOFTMETAL_2_OF_4(l1, x, c1, r) \
  SOFTMETAL_2_OF_4(l1, y, c1, g) SOFTMETAL_2_OF_4(l1, z, c1, b) SOFTMETAL_2_OF_4(l1, w, c1, a)

// Writing: sequences of different letters, of each first letter and the others.
#define SOFTMETAL_PUTS_2(a, b) SOFTMETAL_PUT_2(a, b) SOFTMETAL_PUT_2(b, a)
#define SOFTMETAL_PUTS_3(a, b, c) \
  SOFTMETAL_PUT_2(a, b) SOFTMETAL_PUT_2(a, c) SOFTMETAL_PUT_3(a, b, c) SOFTMETAL_PUT_3(a, c, b)
#define SOFTMETAL_PUTS_4(a, b, c, d)                                                          \
  SOFTMETAL_PUTS_3(a, b, c)                                                                   \
  SOFTMETAL_PUT_2(a, d)                                                                       \
  SOFTMETAL_PUT_3(a, b, d) SOFTMETAL_PUT_3(a, d, b) SOFTMETAL_PUT_3(a, c, d)                  \
      SOFTMETAL_PUT_3(a, d, c) SOFTMETAL_PUT_4(a, b, c, d) SOFTMETAL_PUT_4(a, b, d, c)        \
          SOFTMETAL_PUT_4(a, c, b, d) SOFTMETAL_PUT_4(a, c, d, b) SOFTMETAL_PUT_4(a, d, b, c) \
              SOFTMETAL_PUT_4(a, d, c, b)

#define SOFTMETAL_SWIZZLES_OF_2 SOFTMETAL_1_OF_2(x, r) SOFTMETAL_1_OF_2(y, g) SOFTMETAL_PUTS_2(x, y)
#define SOFTMETAL_SWIZZLES_OF_3                                              \
  SOFTMETAL_1_OF_3(x, r)                                                     \
  SOFTMETAL_1_OF_3(y, g)                                                     \
  SOFTMETAL_1_OF_3(z, b) SOFTMETAL_PUTS_3(x, y, z) SOFTMETAL_PUTS_3(y, x, z) \
      SOFTMETAL_PUTS_3(z, x, y)
#define SOFTMETAL_SWIZZLES_OF_4                                              \
  SOFTMETAL_1_OF_4(x, r)                                                     \
  SOFTMETAL_1_OF_4(y, g)                                                     \
  SOFTMETAL_1_OF_4(z, b) SOFTMETAL_1_OF_4(w, a) SOFTMETAL_PUTS_4(x, y, z, w) \
      SOFTMETAL_PUTS_4(y, x, z, w) SOFTMETAL_PUTS_4(z, x, y, w) SOFTMETAL_PUTS_4(w, x, y, z)
// clang-format on
