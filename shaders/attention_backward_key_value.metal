// Backward, second pass: dV = P^T dO and dK = scale * dS^T Q of a block of keys of one kv head. Its
// threadgroup alone walks the query rows of all heads of the group that see any of them, so the sum
// needs no atomics and its order is fixed. Two pipelines, as forward has.
#include <metal_stdlib>

using namespace metal;

#include "instantiate.h"
#include "query_ring.h"

// What both pipelines have of a simdgroup.
template <typename M, int D>
struct KeyValueGradientRows {
  static constant constexpr int kStride = BlockSizes<M, D>::kStride;

  Matrix<M> keys[D / 8];
  Matrix<M> values[D / 8];
  Matrix<float> key_sum[D / 8];    // dS^T Q
  Matrix<float> value_sum[D / 8];  // P^T dO
  Rows key_rows;
  Rows value_rows;
  Range block_rows;  // that see any key of the threadgroup
  Range seen;        // that see any key of the simdgroup
  int k;
  int b;
  int key;  // of the lane's row

  KeyValueGradientRows(thread const Operands& operands, uint3 group, ushort simdgroup,
                       ushort lane) thread {
    thread const AttentionParameters& p = *operands.parameters;
    const Place place(lane);
    k = group.y;
    b = group.z;
    key_rows = operands.key_rows(b, k);
    value_rows = operands.value_rows(b, k);
    const int block_key = group.x * kBlockRows, first_key = block_key + 8 * simdgroup;
    key = first_key + place.row;
    for (int d = 0; d < D / 8; ++d) {
      float x[2] = {0.0f, 0.0f}, y[2] = {0.0f, 0.0f};
      for (int i = 0; key < p.S && i < 2; ++i) {
        const int column = 8 * d + place.column + i;
        x[i] = key_rows.value(key, column);
        y[i] = value_rows.value(key, column);
      }
      keys[d] = matrix_of<M>(x[0], x[1]);
      values[d] = matrix_of<M>(y[0], y[1]);
      key_sum[d] = value_sum[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    const Visibility visibility(operands, b);
    block_rows = visibility.rows_of_keys({block_key, min(block_key + kBlockRows, p.S)});
    seen = visibility.rows_of_keys({first_key, min(first_key + 8, p.S)});
  }

  // Of query rows `first` and the following, whose queries and dO are given, unless none of them
  // sees any of the eight keys.
  ScoreProducts multiply(thread const AttentionParameters& p, thread const HeadRules& head_rules,
                         int first, threadgroup const M* queries, threadgroup const M* gradients,
                         ushort lane) thread {
    ScoreProducts made;
    made.is_used = false;
    if (first >= seen.end || first + 8 <= seen.begin) return made;
    const int own = first + Place(lane).column;
    made.is_seen =
        bool2(head_rules.row(p, own).sees(p, key), head_rules.row(p, own + 1).sees(p, key));
    if (p.has_mask != 0 && !simd_any(made.is_seen.x || made.is_seen.y)) return made;
    made.is_used = true;
    multiply_scores<M, D>(p, keys, queries, values, gradients, Place(lane), made);
    return made;
  }

  // Takes in those rows, of which the lane has two.
  void accumulate(thread const AttentionParameters& p, thread const HeadRules& head_rules,
                  ScoreProducts made, int first, thread const Rows& queries,
                  threadgroup const M* query_tile, bool queries_are_dirty,
                  thread const Rows& gradients, threadgroup const M* gradient_tile,
                  bool gradients_are_dirty, thread const RowStatistics* statistics,
                  ushort lane) thread {
    const int own = first + Place(lane).column;
    float probabilities[2], score_gradients[2];
    for (int i = 0; i < 2; ++i) {
      float x = made.product[i], y = made.probability_gradient[i];
      if (queries_are_dirty && made.is_seen[i]) {
        x = product_of_rows(key_rows, key, queries, own + i, x);
      }
      if (gradients_are_dirty && made.is_seen[i]) {
        y = product_of_rows(value_rows, key, gradients, own + i, y);
      }
      const ScoreGradient score =
          score_gradient(p, head_rules.row(p, own + i), statistics[i], key, made.is_seen[i], x, y);
      probabilities[i] = score.probability * score.share;
      score_gradients[i] = score.gradient();
    }
    const Matrix<M> left = matrix_of<M>(probabilities[0], probabilities[1]);
    const Matrix<M> left_gradient = matrix_of<M>(score_gradients[0], score_gradients[1]);
    for (int d = 0; d < D / 8; ++d) {
      Matrix<M> right;
      if (8 * d < p.V) {
        right = matrix_at<false>(gradient_tile + 8 * d, kStride, Place(lane));
        simdgroup_multiply_accumulate(value_sum[d], left, right, value_sum[d]);
      }
      if (8 * d < p.H) {
        right = matrix_at<false>(query_tile + 8 * d, kStride, Place(lane));
        simdgroup_multiply_accumulate(key_sum[d], left_gradient, right, key_sum[d]);
      }
    }
    if (gradients_are_dirty) {
      add_nonfinite<D>(gradients, first, p.T, probabilities, value_sum, lane);
    }
  }

  void store(thread const AttentionParameters& p, device uchar* key_gradient,
             device uchar* value_gradient, ushort lane) thread {
    if (key >= p.S) return;
    const Place place(lane);
    const Int64 index = row_index(p, b, key, p.S, k, p.K);
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
};

// clang-format off
#define JAX_GLUON_KEY_VALUE_PASS_OUTPUTS                                                           \
  device const RowStatistics* statistics [[buffer(kRowStatistics)]],                               \
  device uchar* key_gradient [[buffer(kKeyGradient)]],                                             \
  device uchar* value_gradient [[buffer(kValueGradient)]]
// clang-format on

template <typename M, int D>
kernel void attention_backward_key_value(JAX_GLUON_OPERANDS, JAX_GLUON_COTANGENTS,
                                         JAX_GLUON_KEY_VALUE_PASS_OUTPUTS, JAX_GLUON_THREAD) {
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
  KeyValueGradientRows<M, D> rows(operands, group, simdgroup, lane);
  const int k = group.y, b = group.z, heads = p.N / p.K, column = Place(lane).column;
  const Range block_rows = rows.block_rows;

  for (int n = k * heads; n < (k + 1) * heads; ++n) {
    const Rows queries = operands.query_rows(b, n);
    const Rows gradients = out_gradient_rows(operands, cotangents, b, n);
    const HeadRules head_rules(operands, b, n);
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
        threadgroup const M* query_rows = query_tile + t * Sizes::kStride;
        threadgroup const M* gradient_rows = gradient_tile + t * Sizes::kStride;
        const ScoreProducts made =
            rows.multiply(p, head_rules, row0 + t, query_rows, gradient_rows, lane);
        if (!made.is_used) continue;
        const RowStatistics own[2] = {row_statistics[t + column], row_statistics[t + column + 1]};
        rows.accumulate(p, head_rules, made, row0 + t, queries, query_rows, queries_are_dirty,
                        gradients, gradient_rows, gradients_are_dirty, own, lane);
      }
    }
  }
  rows.store(p, key_gradient, value_gradient, lane);
}

template <typename M, int D>
kernel void attention_backward_key_value_gluon(JAX_GLUON_OPERANDS, JAX_GLUON_COTANGENTS,
                                               JAX_GLUON_KEY_VALUE_PASS_OUTPUTS, JAX_GLUON_THREAD) {
  using Queries = QueryRing<M, D>;
  threadgroup typename Queries::Memory memory;
  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const Cotangents cotangents = JAX_GLUON_MAKE_COTANGENTS;
  KeyValueGradientRows<M, D> rows(operands, group, simdgroup, lane);
  const int b = group.z, column = Place(lane).column;
  const QueryWalk walk(group.y, p.N / p.K, rows.block_rows, Queries::kRows);
  Queries ring;
  ring.start(&memory, operands, cotangents, statistics, walk, b, thread_index);
  HeadRules head_rules(operands, b, walk.first_head);
  for (int i = 0; i < walk.count; ++i) {
    if (i > 0 && walk.begins_head(i)) head_rules = HeadRules(operands, b, walk.head(i));
    const Rows queries = ring.query_rows, gradients = ring.gradient_rows;
    const int first = walk.row(i, Queries::kRows);
    ring.prefetch(operands, cotangents, statistics, walk, b, i, thread_index);
    const bool queries_are_dirty = ring.queries.is_dirty(i, lane);
    const bool gradients_are_dirty = ring.gradients.is_dirty(i, lane);
    ScoreProducts made = rows.multiply(p, head_rules, first, ring.queries.rows_of(i, 0),
                                       ring.gradients.rows_of(i, 0), lane);
    for (int t = 0; t < Queries::kRows; t += 8) {
      const ScoreProducts at_hand = made;
      if (t + 8 < Queries::kRows) {
        made = rows.multiply(p, head_rules, first + t + 8, ring.queries.rows_of(i, t + 8),
                             ring.gradients.rows_of(i, t + 8), lane);
      }
      if (!at_hand.is_used) continue;
      const RowStatistics own[2] = {ring.statistics_of(i, t + column),
                                    ring.statistics_of(i, t + column + 1)};
      rows.accumulate(p, head_rules, at_hand, first + t, queries, ring.queries.rows_of(i, t),
                      queries_are_dirty, gradients, ring.gradients.rows_of(i, t),
                      gradients_are_dirty, own, lane);
    }
    ring.advance(walk, i, thread_index);
  }
  rows.store(p, key_gradient, value_gradient, lane);
}

JAX_GLUON_INSTANTIATE_ALL(attention_backward_key_value, float)
JAX_GLUON_INSTANTIATE_ALL(attention_backward_key_value_gluon, float)
JAX_GLUON_INSTANTIATE_ALL(attention_backward_key_value, half)
JAX_GLUON_INSTANTIATE_ALL(attention_backward_key_value_gluon, half)
