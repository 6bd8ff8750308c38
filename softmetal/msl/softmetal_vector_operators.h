// Operators of vectors, component by component; a scalar operand counts for every component. To be
// included by metal_types alone, inside namespace metal.
#pragma once

#define SOFTMETAL_BINARY(op)                                                   \
  template <typename A, typename B>                                            \
    requires softmetal::VectorOperands<A, B>                                   \
  SOFTMETAL_FUNC softmetal::Common<A, B> operator op(const A& a, const B& b) { \
    using V = softmetal::Common<A, B>;                                         \
    V result;                                                                  \
    result.data = V(a).data op V(b).data;                                      \
    return result;                                                             \
  }                                                                            \
  template <typename A, typename B>                                            \
    requires(softmetal::Vector<A> && softmetal::VectorOperands<A, B>)          \
  SOFTMETAL_FUNC A& operator op## = (A & a, const B& b) {                      \
    return a = a op b;                                                         \
  }
SOFTMETAL_BINARY(+)
SOFTMETAL_BINARY(-)
SOFTMETAL_BINARY(*)
SOFTMETAL_BINARY(/)
SOFTMETAL_BINARY(%)
SOFTMETAL_BINARY(&)
SOFTMETAL_BINARY(|)
SOFTMETAL_BINARY(^)
SOFTMETAL_BINARY(<<)
SOFTMETAL_BINARY(>>)
#undef SOFTMETAL_BINARY

// The processor's comparison gives all bits or none.
#define SOFTMETAL_COMPARISON(op)                                                                 \
  template <typename A, typename B>                                                              \
    requires softmetal::VectorOperands<A, B>                                                     \
  SOFTMETAL_FUNC vec<bool, softmetal::kWidth<softmetal::Common<A, B>>> operator op(const A& a,   \
                                                                                   const B& b) { \
    using V = softmetal::Common<A, B>;                                                           \
    using Mask = vec<bool, softmetal::kWidth<V>>;                                                \
    Mask result;                                                                                 \
    result.data = __builtin_convertvector(V(a).data op V(b).data, typename Mask::Data) &         \
                  static_cast<uchar>(1);                                                         \
    return result;                                                                               \
  }
SOFTMETAL_COMPARISON(==)
SOFTMETAL_COMPARISON(!=)
SOFTMETAL_COMPARISON(<)
SOFTMETAL_COMPARISON(<=)
SOFTMETAL_COMPARISON(>)
SOFTMETAL_COMPARISON(>=)
#undef SOFTMETAL_COMPARISON

template <softmetal::Vector A>
SOFTMETAL_FUNC vec<bool, softmetal::kWidth<A>> operator!(const A& a) {
  return a == softmetal::Element<A>(0);
}

// Both sides are evaluated, as for every operator on vectors.
template <typename A, typename B>
  requires softmetal::VectorOperands<A, B>
SOFTMETAL_FUNC vec<bool, softmetal::kWidth<softmetal::Common<A, B>>> operator&&(const A& a,
                                                                                const B& b) {
  using V = softmetal::Common<A, B>;
  using Mask = vec<bool, softmetal::kWidth<V>>;
  return Mask(V(a)) & Mask(V(b));
}
template <typename A, typename B>
  requires softmetal::VectorOperands<A, B>
SOFTMETAL_FUNC vec<bool, softmetal::kWidth<softmetal::Common<A, B>>> operator||(const A& a,
                                                                                const B& b) {
  using V = softmetal::Common<A, B>;
  using Mask = vec<bool, softmetal::kWidth<V>>;
  return Mask(V(a)) | Mask(V(b));
}

template <softmetal::Vector A>
SOFTMETAL_FUNC softmetal::Common<A> operator+(const A& a) {
  return a;
}
template <softmetal::Vector A>
SOFTMETAL_FUNC softmetal::Common<A> operator-(const A& a) {
  softmetal::Common<A> result = a;
  result.data = -result.data;
  return result;
}
template <softmetal::Vector A>
SOFTMETAL_FUNC softmetal::Common<A> operator~(const A& a) {
  softmetal::Common<A> result = a;
  result.data = ~result.data;
  return result;
}
template <softmetal::Vector A>
SOFTMETAL_FUNC A& operator++(A& a) {
  return a += 1;
}
template <softmetal::Vector A>
SOFTMETAL_FUNC A& operator--(A& a) {
  return a -= 1;
}
template <softmetal::Vector A>
SOFTMETAL_FUNC A operator++(A& a, int) {
  A old = a;
  a += 1;
  return old;
}
template <softmetal::Vector A>
SOFTMETAL_FUNC A operator--(A& a, int) {
  A old = a;
  a -= 1;
  return old;
}
