// Functions of simdgroups and quadgroups, and matrices spread over a simdgroup.
#pragma once

namespace metal {

class simd_vote {
 public:
  using vote_t = ulong;
  explicit constexpr simd_vote(vote_t votes = 0) : votes_(votes) {}
  explicit constexpr operator vote_t() const { return votes_; }
  bool all() const;
  bool any() const;
  friend bool operator==(simd_vote, simd_vote);
  friend simd_vote operator&(simd_vote, simd_vote);
  friend simd_vote operator|(simd_vote, simd_vote);
  friend simd_vote operator^(simd_vote, simd_vote);

 private:
  vote_t votes_;
};
class quad_vote {
 public:
  using vote_t = uint;
  explicit constexpr quad_vote(vote_t votes = 0) : votes_(votes) {}
  explicit constexpr operator vote_t() const { return votes_; }
  bool all() const;
  bool any() const;
  friend bool operator==(quad_vote, quad_vote);

 private:
  vote_t votes_;
};

#define SOFTMETAL_GROUP(group)                                \
  template <typename T>                                       \
  T group##_shuffle(T, ushort);                               \
  template <typename T>                                       \
  T group##_broadcast(T, ushort);                             \
  template <typename T>                                       \
  T group##_broadcast_first(T);                               \
  template <typename T>                                       \
  T group##_shuffle_xor(T, ushort);                           \
  template <typename T>                                       \
  T group##_shuffle_up(T, ushort);                            \
  template <typename T>                                       \
  T group##_shuffle_down(T, ushort);                          \
  template <typename T>                                       \
  T group##_shuffle_rotate_up(T, ushort);                     \
  template <typename T>                                       \
  T group##_shuffle_rotate_down(T, ushort);                   \
  template <typename T>                                       \
  T group##_shuffle_and_fill_up(T, T, ushort, ushort = 32);   \
  template <typename T>                                       \
  T group##_shuffle_and_fill_down(T, T, ushort, ushort = 32); \
  SOFTMETAL_REDUCTION(group##_sum)                            \
  SOFTMETAL_REDUCTION(group##_product)                        \
  SOFTMETAL_REDUCTION(group##_min)                            \
  SOFTMETAL_REDUCTION(group##_max)                            \
  SOFTMETAL_REDUCTION(group##_and)                            \
  SOFTMETAL_REDUCTION(group##_or)                             \
  SOFTMETAL_REDUCTION(group##_xor)                            \
  template <typename T>                                       \
  T group##_prefix_inclusive_sum(T);                          \
  template <typename T>                                       \
  T group##_prefix_exclusive_sum(T);                          \
  template <typename T>                                       \
  T group##_prefix_inclusive_product(T);                      \
  template <typename T>                                       \
  T group##_prefix_exclusive_product(T);                      \
  group##_vote group##_ballot(bool);                          \
  group##_vote group##_active_threads_mask();                 \
  bool group##_all(bool);                                     \
  bool group##_any(bool);                                     \
  bool group##_is_first();                                    \
  bool group##_is_helper_thread();
// The plain functions are preferred to a program's own templates of the same name.
#define SOFTMETAL_REDUCTION(name) \
  template <typename T>           \
  T name(T);                      \
  float name(float);              \
  half name(half);                \
  int name(int);                  \
  uint name(uint);                \
  short name(short);              \
  ushort name(ushort);
SOFTMETAL_GROUP(simd)
SOFTMETAL_GROUP(quad)
#undef SOFTMETAL_REDUCTION
#undef SOFTMETAL_GROUP

template <typename T, int Cols, int Rows = Cols>
class simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "simdgroup_matrix has 8 columns and 8 rows");
  static_assert(__is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat),
                "simdgroup_matrix has elements of float, half or bfloat");

 public:
  using storage_type = vec<T, 2>;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal);
  __private storage_type& thread_elements() __private;
  const __private storage_type& thread_elements() const __private;

 private:
  storage_type own_;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <typename T, int Cols, int Rows = Cols>
simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T value);

#define SOFTMETAL_MATRIX_IN(space)                                                         \
  template <typename T>                                                                    \
  void simdgroup_load(__private simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8,     \
                      ulong2 = ulong2(0), bool = false);                                   \
  template <typename T>                                                                    \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong = 8, ulong2 = ulong2(0), \
                       bool = false);
SOFTMETAL_MATRIX_IN(__global)
SOFTMETAL_MATRIX_IN(__local)
#undef SOFTMETAL_MATRIX_IN
template <typename D, typename A, typename B, typename C>
void simdgroup_multiply_accumulate(__private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>);
template <typename D, typename A, typename B>
void simdgroup_multiply(__private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                        simdgroup_matrix<B, 8, 8>);
template <typename T>
simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8>, simdgroup_matrix<T, 8, 8>);

}  // namespace metal
