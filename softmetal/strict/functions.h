// Functions of numbers and vectors, in the families of msl/: what is overloaded for float and half
// there is here.
#pragma once

#define SOFTMETAL_VECTOR_1(name)                           \
  template <typename A, typename V = softmetal::Common<A>> \
  V name(A);
#define SOFTMETAL_VECTOR_2(name)                                          \
  template <typename A, typename B, typename V = softmetal::Common<A, B>> \
  V name(A, B);
#define SOFTMETAL_VECTOR_3(name)                                                         \
  template <typename A, typename B, typename C, typename V = softmetal::Common<A, B, C>> \
  V name(A, B, C);
#define SOFTMETAL_FLOAT_1(name) \
  float name(float);            \
  half name(half);              \
  SOFTMETAL_VECTOR_1(name)
#define SOFTMETAL_FLOAT_2(name) \
  float name(float, float);     \
  half name(half, half);        \
  SOFTMETAL_VECTOR_2(name)
// Templates, so that a program may have overloads of its own for bfloat.
#define SOFTMETAL_FLOAT_3(name)                                              \
  float name(float, float, float);                                           \
  half name(half, half, half);                                               \
  template <typename T, typename = softmetal::Require<__is_same(T, bfloat)>> \
  T name(T, T, T);                                                           \
  SOFTMETAL_VECTOR_3(name)

namespace metal {

// Of every arithmetic scalar; min and max may make a constant.
#define SOFTMETAL_ORDER(T)                                                              \
  constexpr T min(T x, T y) { return y < x ? y : x; }                                   \
  constexpr T max(T x, T y) { return x < y ? y : x; }                                   \
  constexpr T clamp(T x, T low, T high) { return x < low ? low : high < x ? high : x; } \
  T min3(T, T, T);                                                                      \
  T max3(T, T, T);                                                                      \
  T median3(T, T, T);
SOFTMETAL_ORDER(char)
SOFTMETAL_ORDER(signed char)
SOFTMETAL_ORDER(uchar)
SOFTMETAL_ORDER(short)
SOFTMETAL_ORDER(ushort)
SOFTMETAL_ORDER(int)
SOFTMETAL_ORDER(uint)
SOFTMETAL_ORDER(long)
SOFTMETAL_ORDER(ulong)
SOFTMETAL_ORDER(float)
SOFTMETAL_ORDER(half)
#undef SOFTMETAL_ORDER
template <typename T, typename = softmetal::Require<__is_same(T, bfloat)>>
T min(T, T);
template <typename T, typename = softmetal::Require<__is_same(T, bfloat)>>
T max(T, T);
template <typename T, typename = softmetal::Require<__is_same(T, bfloat)>>
T clamp(T, T, T);
template <typename T, typename = softmetal::Require<__is_same(T, bfloat)>, int = 0>
T abs(T);
float abs(float);
half abs(half);
SOFTMETAL_VECTOR_2(min)
SOFTMETAL_VECTOR_2(max)
SOFTMETAL_VECTOR_3(clamp)
SOFTMETAL_VECTOR_3(min3)
SOFTMETAL_VECTOR_3(max3)
SOFTMETAL_VECTOR_3(median3)
SOFTMETAL_VECTOR_1(abs)

SOFTMETAL_FLOAT_1(acos)
SOFTMETAL_FLOAT_1(acosh)
SOFTMETAL_FLOAT_1(asin)
SOFTMETAL_FLOAT_1(asinh)
SOFTMETAL_FLOAT_1(atan)
SOFTMETAL_FLOAT_1(atanh)
SOFTMETAL_FLOAT_1(ceil)
SOFTMETAL_FLOAT_1(cos)
SOFTMETAL_FLOAT_1(cosh)
SOFTMETAL_FLOAT_1(cospi)
SOFTMETAL_FLOAT_1(exp)
SOFTMETAL_FLOAT_1(exp10)
SOFTMETAL_FLOAT_1(exp2)
SOFTMETAL_FLOAT_1(fabs)
SOFTMETAL_FLOAT_1(floor)
SOFTMETAL_FLOAT_1(fract)
SOFTMETAL_FLOAT_1(log)
SOFTMETAL_FLOAT_1(log10)
SOFTMETAL_FLOAT_1(log2)
SOFTMETAL_FLOAT_1(rint)
SOFTMETAL_FLOAT_1(round)
SOFTMETAL_FLOAT_1(rsqrt)
SOFTMETAL_FLOAT_1(saturate)
SOFTMETAL_FLOAT_1(sign)
SOFTMETAL_FLOAT_1(sin)
SOFTMETAL_FLOAT_1(sinh)
SOFTMETAL_FLOAT_1(sinpi)
SOFTMETAL_FLOAT_1(sqrt)
SOFTMETAL_FLOAT_1(tan)
SOFTMETAL_FLOAT_1(tanh)
SOFTMETAL_FLOAT_1(tanpi)
SOFTMETAL_FLOAT_1(trunc)
SOFTMETAL_FLOAT_2(atan2)
SOFTMETAL_FLOAT_2(copysign)
SOFTMETAL_FLOAT_2(divide)
SOFTMETAL_FLOAT_2(fdim)
SOFTMETAL_FLOAT_2(fmax)
SOFTMETAL_FLOAT_2(fmin)
SOFTMETAL_FLOAT_2(fmod)
SOFTMETAL_FLOAT_2(nextafter)
SOFTMETAL_FLOAT_2(pow)
SOFTMETAL_FLOAT_2(powr)
SOFTMETAL_FLOAT_2(step)
SOFTMETAL_FLOAT_3(fma)
SOFTMETAL_FLOAT_3(fmax3)
SOFTMETAL_FLOAT_3(fmedian3)
SOFTMETAL_FLOAT_3(fmin3)
SOFTMETAL_FLOAT_3(mix)
SOFTMETAL_FLOAT_3(smoothstep)

// What comes back through an argument comes to the thread's own memory.
#define SOFTMETAL_WITH_EXPONENT(T) \
  T ldexp(T, int);                 \
  int ilogb(T);                    \
  T frexp(T, __private int&);      \
  T modf(T, __private T&);         \
  T sincos(T, __private T&);
SOFTMETAL_WITH_EXPONENT(float)
SOFTMETAL_WITH_EXPONENT(half)
#undef SOFTMETAL_WITH_EXPONENT
template <typename T, int N, typename K>
vec<T, N> ldexp(vec<T, N>, K);
template <typename T, int N>
vec<int, N> ilogb(vec<T, N>);
template <typename T, int N>
vec<T, N> frexp(vec<T, N>, __private vec<int, N>&);
template <typename T, int N>
vec<T, N> modf(vec<T, N>, __private vec<T, N>&);
template <typename T, int N>
vec<T, N> sincos(vec<T, N>, __private vec<T, N>&);

#define SOFTMETAL_TEST_1(name)                             \
  bool name(float);                                        \
  bool name(half);                                         \
  template <typename A, typename V = softmetal::Common<A>> \
  softmetal::MaskOf<V> name(A);
SOFTMETAL_TEST_1(isfinite)
SOFTMETAL_TEST_1(isinf)
SOFTMETAL_TEST_1(isnan)
SOFTMETAL_TEST_1(isnormal)
SOFTMETAL_TEST_1(signbit)
#undef SOFTMETAL_TEST_1
#define SOFTMETAL_TEST_2(name)                                            \
  bool name(float, float);                                                \
  bool name(half, half);                                                  \
  template <typename A, typename B, typename V = softmetal::Common<A, B>> \
  softmetal::MaskOf<V> name(A, B);
SOFTMETAL_TEST_2(isequal)
SOFTMETAL_TEST_2(isgreater)
SOFTMETAL_TEST_2(isgreaterequal)
SOFTMETAL_TEST_2(isless)
SOFTMETAL_TEST_2(islessequal)
SOFTMETAL_TEST_2(islessgreater)
SOFTMETAL_TEST_2(isnotequal)
SOFTMETAL_TEST_2(isordered)
SOFTMETAL_TEST_2(isunordered)
#undef SOFTMETAL_TEST_2

bool all(bool);
bool any(bool);
template <int N>
bool all(vec<bool, N>);
template <int N>
bool any(vec<bool, N>);
template <typename A, typename B,
          typename = softmetal::Require<softmetal::kWidth<A> == 0 && softmetal::kWidth<B> == 0>>
constexpr auto select(A a, B b, bool condition) {
  return condition ? b : a;
}
template <typename A, typename B, typename C, typename V = softmetal::Common<A, B>>
V select(A, B, C);

#define SOFTMETAL_INTEGER(...)                                                                  \
  template <typename T, typename = softmetal::Require<__is_integral(T) && !__is_same(T, bool)>> \
  __VA_ARGS__;
SOFTMETAL_INTEGER(constexpr T abs(T x) { return x < T(0) ? -x : x; })
SOFTMETAL_INTEGER(T popcount(T))
SOFTMETAL_INTEGER(constexpr T clz(T x) { return T(8 * sizeof(T)) - (x ? T(1) : T(0)); })
SOFTMETAL_INTEGER(T ctz(T))
SOFTMETAL_INTEGER(T reverse_bits(T))
SOFTMETAL_INTEGER(__make_unsigned(T) absdiff(T, T))
SOFTMETAL_INTEGER(T addsat(T, T))
SOFTMETAL_INTEGER(T subsat(T, T))
SOFTMETAL_INTEGER(T hadd(T, T))
SOFTMETAL_INTEGER(T rhadd(T, T))
SOFTMETAL_INTEGER(T mulhi(T, T))
SOFTMETAL_INTEGER(T rotate(T, T))
SOFTMETAL_INTEGER(T madhi(T, T, T))
SOFTMETAL_INTEGER(T madsat(T, T, T))
SOFTMETAL_INTEGER(T extract_bits(T, uint, uint))
SOFTMETAL_INTEGER(T insert_bits(T, T, uint, uint))
#undef SOFTMETAL_INTEGER
int mul24(int, int);
uint mul24(uint, uint);
int mad24(int, int, int);
uint mad24(uint, uint, uint);
SOFTMETAL_VECTOR_1(popcount)
SOFTMETAL_VECTOR_1(clz)
SOFTMETAL_VECTOR_1(ctz)
SOFTMETAL_VECTOR_1(reverse_bits)
template <typename A, typename B, typename V = softmetal::Common<A, B>>
vec<__make_unsigned(softmetal::Element<V>), softmetal::kWidth<V>> absdiff(A, B);
SOFTMETAL_VECTOR_2(addsat)
SOFTMETAL_VECTOR_2(subsat)
SOFTMETAL_VECTOR_2(hadd)
SOFTMETAL_VECTOR_2(rhadd)
SOFTMETAL_VECTOR_2(mulhi)
SOFTMETAL_VECTOR_2(rotate)
SOFTMETAL_VECTOR_2(mul24)
SOFTMETAL_VECTOR_3(mad24)
SOFTMETAL_VECTOR_3(madhi)
SOFTMETAL_VECTOR_3(madsat)
template <typename T, int N>
vec<T, N> extract_bits(vec<T, N>, uint, uint);
template <typename T, int N>
vec<T, N> insert_bits(vec<T, N>, vec<T, N>, uint, uint);

#define SOFTMETAL_SCALAR_OF_2(name)                                       \
  template <typename A, typename B, typename V = softmetal::Common<A, B>> \
  softmetal::Element<V> name(A, B);
SOFTMETAL_SCALAR_OF_2(distance)
SOFTMETAL_SCALAR_OF_2(distance_squared)
SOFTMETAL_SCALAR_OF_2(dot)
#undef SOFTMETAL_SCALAR_OF_2
template <typename A, typename V = softmetal::Common<A>>
softmetal::Element<V> length(A);
template <typename A, typename V = softmetal::Common<A>>
softmetal::Element<V> length_squared(A);
SOFTMETAL_VECTOR_1(normalize)
SOFTMETAL_VECTOR_2(cross)
SOFTMETAL_VECTOR_2(reflect)
SOFTMETAL_VECTOR_3(faceforward)
template <typename A, typename B, typename T, typename V = softmetal::Common<A, B>>
V refract(A, B, T);

#define SOFTMETAL_PACK(T)                 \
  uint pack_##T##_to_unorm4x8(T##4);      \
  uint pack_##T##_to_snorm4x8(T##4);      \
  uint pack_##T##_to_srgb_unorm4x8(T##4); \
  uint pack_##T##_to_unorm2x16(T##2);     \
  uint pack_##T##_to_snorm2x16(T##2);     \
  uint pack_##T##_to_unorm10a2(T##4);     \
  ushort pack_##T##_to_unorm565(T##3);    \
  T##4 unpack_unorm4x8_to_##T(uint);      \
  T##4 unpack_snorm4x8_to_##T(uint);      \
  T##4 unpack_unorm4x8_srgb_to_##T(uint); \
  T##2 unpack_unorm2x16_to_##T(uint);     \
  T##2 unpack_snorm2x16_to_##T(uint);     \
  T##4 unpack_unorm10a2_to_##T(uint);     \
  T##3 unpack_unorm565_to_##T(ushort);
SOFTMETAL_PACK(float)
SOFTMETAL_PACK(half)
#undef SOFTMETAL_PACK

}  // namespace metal
