// Functions of a simdgroup and of a quadgroup. Each writes one row of results per thread.
#include <metal_stdlib>
using namespace metal;

template <typename T>
static void shuffles(device T* out, T v, ushort lane) {
  const T results[] = {
      simd_shuffle(v, ushort(31 - lane)),
      simd_shuffle_xor(v, 5),
      simd_shuffle_up(v, 3),
      simd_shuffle_down(v, 3),
      simd_shuffle_rotate_up(v, 7),
      simd_shuffle_rotate_down(v, 7),
      simd_broadcast(v, 9),
      simd_broadcast_first(v),
      simd_shuffle_and_fill_up(v, T(v * T(2)), 4),
      simd_shuffle_and_fill_down(v, T(v * T(2)), 4),
      simd_shuffle_and_fill_up(v, T(v * T(2)), 2, 8),
      simd_shuffle_and_fill_down(v, T(v * T(2)), 2, 8),
  };
  for (uint i = 0; i < 12; ++i) out[i] = results[i];
}
#define SHUFFLES(T)                                                                      \
  kernel void shuffle_##T(device T* out [[buffer(0)]], device const T* in [[buffer(1)]], \
                          uint i [[thread_position_in_grid]],                            \
                          ushort lane [[thread_index_in_simdgroup]]) {                   \
    shuffles<T>(out + 12 * i, in[i], lane);                                              \
  }
SHUFFLES(char)
SHUFFLES(ushort)
SHUFFLES(int)
SHUFFLES(half)
SHUFFLES(float)
SHUFFLES(bfloat)

kernel void shuffle_vectors(device float4* out [[buffer(0)]], device const float4* in [[buffer(1)]],
                            uint i [[thread_position_in_grid]]) {
  out[i] = simd_shuffle_xor(in[i], 1) + float4(simd_sum(half2(in[i].xy)), 0, 0);
}

template <typename T>
static void reductions(device T* out, T v) {
  out[0] = simd_sum(v);
  out[1] = simd_product(v);
  out[2] = simd_min(v);
  out[3] = simd_max(v);
  out[4] = simd_prefix_inclusive_sum(v);
  out[5] = simd_prefix_exclusive_sum(v);
  out[6] = simd_prefix_inclusive_product(v);
  out[7] = simd_prefix_exclusive_product(v);
}
#define REDUCTIONS(T)                                                                   \
  kernel void reduce_##T(device T* out [[buffer(0)]], device const T* in [[buffer(1)]], \
                         uint i [[thread_position_in_grid]]) {                          \
    reductions<T>(out + 8 * i, in[i]);                                                  \
  }
REDUCTIONS(int)
REDUCTIONS(uint)
REDUCTIONS(half)
REDUCTIONS(float)

kernel void reduce_bits(device uint* out [[buffer(0)]], device const uint* in [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) {
  out[3 * i] = simd_and(in[i]);
  out[3 * i + 1] = simd_or(in[i]);
  out[3 * i + 2] = simd_xor(in[i]);
}

kernel void votes(device uint* out [[buffer(0)]], device const uint* in [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  const simd_vote vote = simd_ballot(in[i] > 20);
  out[6 * i] = uint((simd_vote::vote_t)vote);
  out[6 * i + 1] = simd_all(in[i] < 40);
  out[6 * i + 2] = simd_any(in[i] == 3);
  out[6 * i + 3] = uint((ulong)simd_active_threads_mask());
  out[6 * i + 4] = simd_is_first();
  out[6 * i + 5] = vote.any() && !vote.all();
}

kernel void quads(device int* out [[buffer(0)]], device const int* in [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  const int v = in[i];
  const int results[] = {
      quad_shuffle(v, 2),
      quad_shuffle_xor(v, 1),
      quad_shuffle_up(v, 1),
      quad_shuffle_down(v, 1),
      quad_shuffle_rotate_up(v, 1),
      quad_shuffle_rotate_down(v, 1),
      quad_broadcast(v, 3),
      quad_broadcast_first(v),
      quad_sum(v),
      quad_product(v),
      quad_min(v),
      quad_max(v),
      quad_and(v),
      quad_or(v),
      quad_xor(v),
      quad_prefix_inclusive_sum(v),
      quad_prefix_exclusive_sum(v),
      int((quad_vote::vote_t)quad_ballot(v % 2 == 0)),
      quad_all(v < 100),
      quad_any(v == 4),
  };
  for (uint k = 0; k < 20; ++k) out[20 * i + k] = results[k];
}
