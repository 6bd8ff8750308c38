// Backward, second pass: dV = P^T dO and dK = scale * dS^T Q of a block of keys of one kv head. Its
// threadgroup alone walks the query rows of all heads of the group that see any of them, so the sum
// needs no atomics and its order is fixed.
#include <metal_stdlib>

using namespace metal;

#include "backward_rows.h"

template <typename M, int D>
kernel void attention_backward_key_value(JAX_GLUON_OPERANDS, JAX_GLUON_COTANGENTS,
                                         device const RowStatistics* statistics
                                         [[buffer(kRowStatistics)]],
                                         device uchar* key_gradient [[buffer(kKeyGradient)]],
                                         device uchar* value_gradient [[buffer(kValueGradient)]],
                                         JAX_GLUON_THREAD) {
  using Sizes = BlockSizes<M, D>;
  threadgroup M query_tile[Sizes::kTileElements];
  threadgroup M gradient_tile[Sizes::kTileElements];
  threadgroup RowStatistics row_statistics[Sizes::kTileRows];
  threadgroup float scales[Sizes::kTileRows];
  threadgroup bool queries_dirty[kThreads];
  threadgroup bool gradients_dirty[kThreads];

  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const Cotangents cotangents = JAX_GLUON_MAKE_COTANGENTS;
  const int k = group.y, b = group.z, heads = p.N / p.K;
  const Place place(lane);

  const int block_key = group.x * kBlockRows, first_key = block_key + 8 * simdgroup;
  const int key_row = first_key + place.row;
  Matrix<M> keys[D / 8], values[D / 8];
  Matrix<float> key_sum[D / 8], value_sum[D / 8];
  const Rows key_rows = operands.key_rows(b, k), value_rows = operands.value_rows(b, k);
  for (int d = 0; d < D / 8; ++d) {
    float x[2] = {0.0f, 0.0f}, y[2] = {0.0f, 0.0f};
    for (int i = 0; key_row < p.S && i < 2; ++i) {
      const int column = 8 * d + place.column + i;
      x[i] = key_rows.value(key_row, column);
      y[i] = value_rows.value(key_row, column);
    }
    keys[d] = matrix_of<M>(x[0], x[1]);
    values[d] = matrix_of<M>(y[0], y[1]);
    key_sum[d] = value_sum[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }

  for (int n = k * heads; n < (k + 1) * heads; ++n) {
    const Rows queries = operands.query_rows(b, n);
    const Rows gradients = out_gradient_rows(operands, cotangents, b, n);
    const HeadRules head_rules(operands, b, n);
    const Visibility visibility = head_rules.visibility;
    const Range block_rows = visibility.rows_of_keys({block_key, min(block_key + kBlockRows, p.S)});
    const Range seen = visibility.rows_of_keys({first_key, min(first_key + 8, p.S)});
    for (int row0 = block_rows.begin / 8 * 8; row0 < block_rows.end; row0 += Sizes::kTileRows) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      queries_dirty[thread_index] = load_tile<M, D, true>(queries, row0, block_rows.end, query_tile,
                                                          scales, false, scales, thread_index);
      gradients_dirty[thread_index] = load_tile<M, D, true>(
          gradients, row0, block_rows.end, gradient_tile, scales, false, scales, thread_index);
      if (thread_index < Sizes::kTileRows && row0 + thread_index < block_rows.end) {
        row_statistics[thread_index] = statistics[(Int64(b) * p.N + n) * p.T + row0 + thread_index];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const bool queries_are_dirty = any_dirty(queries_dirty, lane);
      const bool gradients_are_dirty = any_dirty(gradients_dirty, lane);
      for (int t = 0; t < Sizes::kTileRows; t += 8) {
        const int first = row0 + t;
        if (first >= seen.end || first + 8 <= seen.begin) continue;
        const RowRules rules[2] = {head_rules.row(p, first + place.column),
                                   head_rules.row(p, first + place.column + 1)};
        const bool2 is_seen = bool2(rules[0].sees(p, key_row), rules[1].sees(p, key_row));
        if (p.has_mask != 0 && !simd_any(is_seen.x || is_seen.y)) continue;
        Matrix<float> product = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        Matrix<float> gradient = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (int d = 0; d < D / 8; ++d) {
          const int at = t * Sizes::kStride + 8 * d;
          Matrix<M> right;
          if (8 * d < p.H) {
            simdgroup_load(right, query_tile + at, Sizes::kStride, ulong2(0), true);
            simdgroup_multiply_accumulate(product, keys[d], right, product);
          }
          if (8 * d < p.V) {
            simdgroup_load(right, gradient_tile + at, Sizes::kStride, ulong2(0), true);
            simdgroup_multiply_accumulate(gradient, values[d], right, gradient);
          }
        }
        float probabilities[2], score_gradients[2];
        for (int i = 0; i < 2; ++i) {
          const int row = first + place.column + i;
          float x = product.thread_elements()[i], y = gradient.thread_elements()[i];
          if (queries_are_dirty && is_seen[i]) {
            x = product_of_rows(key_rows, key_row, queries, row, x);
          }
          if (gradients_are_dirty && is_seen[i]) {
            y = product_of_rows(value_rows, key_row, gradients, row, y);
          }
          const ScoreGradient score = score_gradient(
              p, rules[i], row_statistics[t + place.column + i], key_row, is_seen[i], x, y);
          probabilities[i] = score.probability;
          score_gradients[i] = score.gradient;
        }
        const Matrix<M> left = matrix_of<M>(probabilities[0], probabilities[1]);
        const Matrix<M> left_gradient = matrix_of<M>(score_gradients[0], score_gradients[1]);
        for (int d = 0; d < D / 8; ++d) {
          const int at = t * Sizes::kStride + 8 * d;
          Matrix<M> right;
          if (8 * d < p.V) {
            simdgroup_load(right, gradient_tile + at, Sizes::kStride, ulong2(0), false);
            simdgroup_multiply_accumulate(value_sum[d], left, right, value_sum[d]);
          }
          if (8 * d < p.H) {
            simdgroup_load(right, query_tile + at, Sizes::kStride, ulong2(0), false);
            simdgroup_multiply_accumulate(key_sum[d], left_gradient, right, key_sum[d]);
          }
        }
        if (gradients_are_dirty) {
          add_nonfinite<D>(gradients, first, p.T, probabilities, value_sum, lane);
        }
      }
    }
  }

  if (key_row >= p.S) return;
  const Int64 index = (Int64(b) * p.S + key_row) * p.K + k;
  for (int d = 0; d < D / 8; ++d) {
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * d + place.column + i;
      if (column < p.H) {
        store_float(key_gradient, p.out_type, index * p.H + column,
                    key_sum[d].thread_elements()[i] * p.scale);
      }
      if (column < p.V) {
        store_float(value_gradient, p.out_type, index * p.V + column,
                    value_sum[d].thread_elements()[i]);
      }
    }
  }
}

#define JAX_GLUON_INSTANTIATE(type, dim)                                                    \
  template [[host_name("attention_backward_key_value_" #type                                \
                       "_" #dim)]] kernel decltype(attention_backward_key_value<type, dim>) \
      attention_backward_key_value<type, dim>;
#define JAX_GLUON_INSTANTIATE_ALL(type) \
  JAX_GLUON_INSTANTIATE(type, 64)       \
  JAX_GLUON_INSTANTIATE(type, 128)      \
  JAX_GLUON_INSTANTIATE(type, 256)

JAX_GLUON_INSTANTIATE_ALL(float)
JAX_GLUON_INSTANTIATE_ALL(half)
