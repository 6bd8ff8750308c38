// Scalar, vector, packed and matrix types.
#pragma once

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using bfloat = __bf16;
using size_t = decltype(sizeof(0));
using ptrdiff_t = long;
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;

namespace metal {
template <typename T, int N>
struct vec;
template <typename T, int N>
struct packed_vec;
}  // namespace metal

namespace softmetal {

template <bool B, typename T = void>
struct If {};
template <typename T>
struct If<true, T> {
  using type = T;
};
template <bool B>
using Require = typename If<B>::type;

// As in msl/metal_types: a value's element type and width, 0 for a scalar.
template <typename T>
struct VectorShape {
  using Element = T;
  static __constant constexpr int kWidth = 0;
};
template <typename T, int N>
struct VectorShape<metal::vec<T, N>> {
  using Element = T;
  static __constant constexpr int kWidth = N;
};
template <typename T, int N>
struct VectorShape<metal::packed_vec<T, N>> : VectorShape<metal::vec<T, N>> {};

// Types without qualifiers; an address space is one.
template <typename T>
struct Unqualified {
  using type = __remove_cvref(T);
};
template <typename T>
struct Unqualified<__global T> : Unqualified<T> {};
template <typename T>
struct Unqualified<__local T> : Unqualified<T> {};
template <typename T>
struct Unqualified<__private T> : Unqualified<T> {};
template <typename T>
struct Unqualified<__constant T> : Unqualified<T> {};
template <typename T>
using Bare = typename Unqualified<__remove_cvref(T)>::type;

template <typename T>
__constant constexpr int kWidth = VectorShape<Bare<T>>::kWidth;
template <typename T>
using Element = typename VectorShape<Bare<T>>::Element;
template <typename T>
__constant constexpr int kParts = kWidth<T> == 0 ? 1 : kWidth<T>;

// The vector type that an operation on operands of these types computes in; none where they
// disagree in width or element type. Scalars convert to the element type of the vector.
template <bool Found, typename A, typename... Rest>
struct FirstVector {
  using type = A;
};
template <typename A>
struct FirstVector<false, A> {};
template <typename A, typename B, typename... Rest>
struct FirstVector<false, A, B, Rest...> : FirstVector<(kWidth<B> != 0), B, Rest...> {};

template <typename V, typename T>
__constant constexpr bool kFits =
    kWidth<T> == 0 ? __is_convertible(T, Element<V>)
                   : kWidth<T> == kWidth<V> && __is_same(Element<T>, Element<V>);

template <typename V, typename... Operands>
using CommonWith =
    typename If<(kFits<V, Operands> && ...), metal::vec<Element<V>, kWidth<V>>>::type;
template <typename... Operands>
using Common = CommonWith<typename FirstVector<false, void, Operands...>::type, Operands...>;
template <typename V>
using MaskOf = metal::vec<bool, kWidth<V>>;

template <typename... Args>
__constant constexpr int kTotalWidth = (kParts<Args> + ...);

// static_cast, which the compiler refuses between half and bfloat.
template <typename To, typename From>
constexpr To cast(From value) {
  if constexpr ((__is_same(Bare<To>, half) && __is_same(Bare<From>, bfloat)) ||
                (__is_same(Bare<To>, bfloat) && __is_same(Bare<From>, half))) {
    return static_cast<To>(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

}  // namespace softmetal

#define SOFTMETAL_GETTER(N, name, ...)                                \
  constexpr vec<T, N> name() const { return vec<T, N>(__VA_ARGS__); } \
  constexpr vec<T, N> name() const __constant { return vec<T, N>(__VA_ARGS__); }
#include "msl/softmetal_swizzles.h"

// An element has its vector's address space. The last one is of a vector that is no variable.
#define SOFTMETAL_SUBSCRIPTS(Part)                               \
  __global Part& operator[](ptrdiff_t) __global;                 \
  const __global Part& operator[](ptrdiff_t) const __global;     \
  __local Part& operator[](ptrdiff_t) __local;                   \
  const __local Part& operator[](ptrdiff_t) const __local;       \
  __private Part& operator[](ptrdiff_t) __private;               \
  const __private Part& operator[](ptrdiff_t) const __private;   \
  const __constant Part& operator[](ptrdiff_t) const __constant; \
  Part operator[](ptrdiff_t) const;

#define SOFTMETAL_COMPOUND(Self, op)                           \
  template <typename B, typename = softmetal::Common<Self, B>> \
  Self operator op## = (B);
#define SOFTMETAL_COMPOUNDS(Self) \
  SOFTMETAL_COMPOUND(Self, +)     \
  SOFTMETAL_COMPOUND(Self, -)     \
  SOFTMETAL_COMPOUND(Self, *)     \
  SOFTMETAL_COMPOUND(Self, /)     \
  SOFTMETAL_COMPOUND(Self, %)     \
  SOFTMETAL_COMPOUND(Self, &)     \
  SOFTMETAL_COMPOUND(Self, |)     \
  SOFTMETAL_COMPOUND(Self, ^)     \
  SOFTMETAL_COMPOUND(Self, <<)    \
  SOFTMETAL_COMPOUND(Self, >>)    \
  Self operator++();              \
  Self operator--();              \
  Self operator++(int);           \
  Self operator--(int);

// Constructors, of objects in any address space and of constants. A copy from constant memory is a
// template: so the type stays trivial.
#define SOFTMETAL_CONSTRUCTORS(Self, N, space)                                                  \
  template <typename S,                                                                         \
            typename = softmetal::Require<softmetal::kWidth<S> == 0 && __is_convertible(S, T)>> \
  constexpr Self(S) space : SOFTMETAL_ZEROS_##N {}                                              \
  template <typename A, typename B, typename... Rest,                                           \
            typename = softmetal::Require<softmetal::kTotalWidth<A, B, Rest...> == N>>          \
  constexpr Self(A, B, Rest...) space : SOFTMETAL_ZEROS_##N {}                                  \
  template <typename U, typename = softmetal::Require<__is_same(U, T)>>                         \
  constexpr Self(const __constant Self<U, N>&) space : SOFTMETAL_ZEROS_##N {}                   \
  template <typename U, typename = softmetal::Require<!__is_same(U, T)>>                        \
  explicit constexpr Self(const vec<U, N>&) space : SOFTMETAL_ZEROS_##N {}                      \
  template <typename U, typename = softmetal::Require<!__is_same(U, T)>, int = 0>               \
  explicit constexpr Self(const __constant vec<U, N>&) space : SOFTMETAL_ZEROS_##N {}
#define SOFTMETAL_ZEROS_2 x(), y()
#define SOFTMETAL_ZEROS_3 x(), y(), z()
#define SOFTMETAL_ZEROS_4 x(), y(), z(), w()

#define SOFTMETAL_VECTOR_MEMBERS(Self, N)     \
  constexpr Self() = default;                 \
  SOFTMETAL_CONSTRUCTORS(Self, N, )           \
  SOFTMETAL_CONSTRUCTORS(Self, N, __constant) \
  SOFTMETAL_SUBSCRIPTS(T)                     \
  SOFTMETAL_COMPOUNDS(Self)                   \
  SOFTMETAL_SWIZZLES_OF_##N

#define SOFTMETAL_COMPONENTS_2 \
  union {                      \
    struct {                   \
      T x, y;                  \
    };                         \
    struct {                   \
      T r, g;                  \
    };                         \
  };
#define SOFTMETAL_COMPONENTS_3 \
  union {                      \
    struct {                   \
      T x, y, z;               \
    };                         \
    struct {                   \
      T r, g, b;               \
    };                         \
  };
#define SOFTMETAL_COMPONENTS_4 \
  union {                      \
    struct {                   \
      T x, y, z, w;            \
    };                         \
    struct {                   \
      T r, g, b, a;            \
    };                         \
  };

namespace metal {

#define SOFTMETAL_VECTOR(N, Slots)                                                       \
  template <typename T>                                                                  \
  struct alignas(Slots * sizeof(T)) vec<T, N> {                                          \
    SOFTMETAL_COMPONENTS_##N SOFTMETAL_VECTOR_MEMBERS(vec, N)                            \
  };                                                                                     \
  template <typename T>                                                                  \
  struct packed_vec<T, N> {                                                              \
    SOFTMETAL_COMPONENTS_##N SOFTMETAL_VECTOR_MEMBERS(packed_vec,                        \
                                                      N) constexpr packed_vec(vec<T, N>) \
        : SOFTMETAL_ZEROS_##N {}                                                         \
    constexpr operator vec<T, N>() const { return vec<T, N>(x); }                        \
    constexpr operator vec<T, N>() const __constant { return vec<T, N>(x); }             \
    template <typename U, typename = softmetal::Require<!__is_same(U, T)>>               \
    explicit operator vec<U, N>() const;                                                 \
  };
SOFTMETAL_VECTOR(2, 2)
SOFTMETAL_VECTOR(3, 4)
SOFTMETAL_VECTOR(4, 4)

#define SOFTMETAL_BINARY(op)                                              \
  template <typename A, typename B, typename V = softmetal::Common<A, B>> \
  V operator op(A, B);
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
#define SOFTMETAL_COMPARISON(op)                                          \
  template <typename A, typename B, typename V = softmetal::Common<A, B>> \
  softmetal::MaskOf<V> operator op(A, B);
SOFTMETAL_COMPARISON(==)
SOFTMETAL_COMPARISON(!=)
SOFTMETAL_COMPARISON(<)
SOFTMETAL_COMPARISON(<=)
SOFTMETAL_COMPARISON(>)
SOFTMETAL_COMPARISON(>=)
SOFTMETAL_COMPARISON(&&)
SOFTMETAL_COMPARISON(||)
template <typename A, typename V = softmetal::Common<A>>
softmetal::MaskOf<V> operator!(A);
template <typename A, typename V = softmetal::Common<A>>
V operator+(A);
template <typename A, typename V = softmetal::Common<A>>
V operator-(A);
template <typename A, typename V = softmetal::Common<A>>
V operator~(A);

template <typename T, int Cols, int Rows = Cols>
struct matrix {
  using Column = vec<T, Rows>;
  Column columns[Cols];

  constexpr matrix() = default;
  explicit matrix(T diagonal);
  template <typename A, typename B, typename... Rest,
            typename = softmetal::Require<2 + sizeof...(Rest) == Cols ||
                                          2 + sizeof...(Rest) == Cols * Rows>>
  matrix(A, B, Rest...);
  template <typename U, typename = softmetal::Require<!__is_same(U, T)>>
  explicit matrix(const matrix<U, Cols, Rows>&);
  template <typename U, typename = softmetal::Require<__is_same(U, T)>>
  matrix(const __constant matrix<U, Cols, Rows>&);

  SOFTMETAL_SUBSCRIPTS(Column)
  matrix operator+=(matrix);
  matrix operator-=(matrix);
  matrix operator*=(T);
  matrix operator/=(T);
  matrix operator*=(matrix<T, Cols, Cols>);

  friend matrix operator+(matrix, matrix);
  friend matrix operator-(matrix, matrix);
  friend matrix operator-(matrix);
  friend matrix operator*(matrix, T);
  friend matrix operator*(T, matrix);
  friend matrix operator/(matrix, T);
  friend bool operator==(matrix, matrix);
  friend Column operator*(matrix, vec<T, Cols>);
  friend vec<T, Cols> operator*(Column, matrix);
};
template <typename T, int Inner, int Rows, int Cols>
matrix<T, Cols, Rows> operator*(matrix<T, Inner, Rows>, matrix<T, Cols, Inner>);
template <typename T, int Cols, int Rows>
matrix<T, Rows, Cols> transpose(matrix<T, Cols, Rows>);
template <typename T, int N>
T determinant(matrix<T, N, N>);

template <typename T, size_t N>
struct array {
  using value_type = T;
  T elements[N];

  constexpr bool empty() const { return N == 0; }
  constexpr size_t size() const { return N; }
  constexpr size_t max_size() const { return N; }
  SOFTMETAL_SUBSCRIPTS(T)
#define SOFTMETAL_ACCESS(space)          \
  space T* data() space;                 \
  const space T* data() const space;     \
  space T* begin() space;                \
  const space T* begin() const space;    \
  space T* end() space;                  \
  const space T* end() const space;      \
  space T& at(size_t) space;             \
  const space T& at(size_t) const space; \
  space T& front() space;                \
  const space T& front() const space;    \
  space T& back() space;                 \
  const space T& back() const space;
  SOFTMETAL_ACCESS(__global)
  SOFTMETAL_ACCESS(__local)
  SOFTMETAL_ACCESS(__private)
#undef SOFTMETAL_ACCESS
  void fill(T value);
};

template <typename T>
struct uniform {
  T value;
  constexpr uniform() = default;
  constexpr uniform(T v) : value(v) {}
  constexpr operator T() const { return value; }
};
template <typename T>
constexpr uniform<T> make_uniform(T value) {
  return uniform<T>(value);
}

}  // namespace metal

#include "msl/softmetal_matrix_names.h"
#include "msl/softmetal_type_names.h"

template <typename To, typename From>
To as_type(From) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
}
namespace metal {
using ::as_type;
}
