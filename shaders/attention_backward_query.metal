// Backward, first pass: dQ = scale * dS K of a block of query rows of one head, and the statistics
// of the rows for the second pass. Two pipelines, as forward has. Where delta has a remainder r
// that is known at the end only, dQ is scale * (dS K - r P K), which leaves little to cancel.
#include <metal_stdlib>

using namespace metal;

#include "backward_rows.h"
#include "instantiate.h"
#include "ring.h"

// What both pipelines have of a simdgroup.
template <typename M, int D>
struct QueryGradientRows {
  BackwardRows<M, D> rows;
  Matrix<float> sum[D / 8];              // dS K
  Matrix<float> probability_sum[D / 8];  // P K, where delta is refined; P times the cap's slope
  float gradient_sum;                    // of the lane's elements of dS
  float weight_sum;                      // of the lane's elements of P, times the slope
  Rows queries;
  Rows keys;
  Rows values;
  RowRules rules;    // of the lane's row
  Range block_keys;  // that any row of the threadgroup sees
  Range seen;        // that any row of the simdgroup sees
  int b;
  int n;
  int row;

  QueryGradientRows(thread const Operands& operands, thread const Cotangents& cotangents,
                    uint3 group, ushort simdgroup, ushort lane) thread {
    thread const AttentionParameters& p = *operands.parameters;
    n = group.y;
    b = group.z;
    const int k = n / (p.N / p.K);
    queries = operands.query_rows(b, n);
    keys = operands.key_rows(b, k);
    values = operands.value_rows(b, k);
    const HeadRules head_rules(operands, b, n);
    const Visibility visibility = head_rules.visibility;
    const int block_row = group.x * kBlockRows, first_row = block_row + 8 * simdgroup;
    row = first_row + Place(lane).row;
    rows.start(operands, cotangents, b, n, row, lane);
    for (int d = 0; d < D / 8; ++d) {
      sum[d] = probability_sum[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    gradient_sum = weight_sum = 0.0f;
    rules = head_rules.row(p, row);
    block_keys = visibility.of_rows({block_row, min(block_row + kBlockRows, p.T)});
    seen = visibility.of_rows({first_row, min(first_row + 8, p.T)});
  }

  // Takes in keys `first` and the following, whose rows are at `key_rows`.
  void accumulate(thread const AttentionParameters& p, ScoreProducts made, int first,
                  threadgroup const M* key_rows, bool keys_are_dirty, ushort lane) thread {
    if (!made.is_used) return;
    const int own = first + Place(lane).column;
    float gradients[2], weights[2];
    for (int i = 0; i < 2; ++i) {
      float product = made.product[i];
      if (keys_are_dirty && made.is_seen[i]) {
        product = product_of_rows(queries, row, keys, own + i, product);
      }
      const ScoreGradient score =
          score_gradient(p, rules, rows.statistics, own + i, made.is_seen[i], product,
                         made.probability_gradient[i]);
      gradients[i] = score.gradient();
      gradient_sum += gradients[i];
      if (refines_delta()) {
        weights[i] = score.probability * score.slope;
        weight_sum += weights[i];
        rows.remainder.add(score);
      }
    }
    const Matrix<M> left = matrix_of<M>(gradients[0], gradients[1]);
    Matrix<M> left_weights;
    if (refines_delta()) left_weights = matrix_of<M>(weights[0], weights[1]);
    for (int d = 0; d < D / 8; ++d) {
      if (8 * d >= p.H) continue;
      const Matrix<M> right =
          matrix_at<false>(key_rows + 8 * d, BlockSizes<M, D>::kStride, Place(lane));
      simdgroup_multiply_accumulate(sum[d], left, right, sum[d]);
      if (refines_delta()) {
        simdgroup_multiply_accumulate(probability_sum[d], left_weights, right, probability_sum[d]);
      }
    }
  }

  void store(thread const AttentionParameters& p, device RowStatistics* statistics,
             device uchar* query_gradient, ushort lane) thread {
    const Place place(lane);
    float total = row_sum(gradient_sum), rest = 0.0f;
    if (refines_delta()) {
      rest = rows.remainder.of_row(rows.log_sum_exp_gradient);
      rows.statistics.delta += rest;
      total -= rest * row_sum(weight_sum);
    }
    if (row >= p.T) return;
    if (place.column == 0) statistics[(Int64(b) * p.N + n) * p.T + row] = rows.statistics;
    // The center's part is exactly 0 unless logits were capped, the log-sum-exp has a gradient, or
    // there is a sink.
    const bool adds_center = keys.has_center() && (p.soft_cap != 0.0f || p.has_sinks != 0 ||
                                                   p.has_log_sum_exp_gradient != 0);
    const Int64 index = row_index(p, b, row, p.T, n, p.N) * p.H;
    for (int d = 0; 8 * d < p.H; ++d) {
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * d + place.column + i;
        if (column >= p.H) continue;
        float x = sum[d].thread_elements()[i];
        if (refines_delta()) x -= rest * probability_sum[d].thread_elements()[i];
        if (adds_center) x += total * keys.center_at(column);
        store_float(query_gradient, p.out_type, index + column, x * p.scale);
      }
    }
  }
};

// clang-format off
#define JAX_GLUON_QUERY_PASS_OUTPUTS                                                               \
  device RowStatistics* statistics [[buffer(kRowStatistics)]],                                     \
  device uchar* query_gradient [[buffer(kQueryGradient)]]
// clang-format on

template <typename M, int D>
kernel void attention_backward_query(JAX_GLUON_OPERANDS, JAX_GLUON_COTANGENTS,
                                     JAX_GLUON_QUERY_PASS_OUTPUTS, JAX_GLUON_THREAD) {
  using Sizes = BlockSizes<M, D>;
  JAX_GLUON_KEY_VALUE_TILES(M, D);
  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  QueryGradientRows<M, D> rows(JAX_GLUON_MAKE_OPERANDS, JAX_GLUON_MAKE_COTANGENTS, group, simdgroup,
                               lane);
  const Rows keys = rows.keys, values = rows.values;
  const int end = rows.block_keys.end;
  for (int key0 = tiles.start(keys, values, rows.block_keys, thread_index); key0 < end;
       key0 += tiles.kRows) {
    const bool keys_are_dirty =
        tiles.template load<true, false>(keys, values, key0, end, thread_index);
    for (int t = 0; t < Sizes::kTileRows; t += 8) {
      const int first = key0 + t, at = t * Sizes::kStride;
      const ScoreProducts made = rows.rows.multiply(p, rows.rules, rows.seen, first,
                                                    tiles.keys + at, tiles.values + at, lane);
      rows.accumulate(p, made, first, tiles.keys + at, keys_are_dirty, lane);
    }
  }
  rows.store(p, statistics, query_gradient, lane);
}

template <typename M, int D>
kernel void attention_backward_query_gluon(JAX_GLUON_OPERANDS, JAX_GLUON_COTANGENTS,
                                           JAX_GLUON_QUERY_PASS_OUTPUTS, JAX_GLUON_THREAD) {
  using Sizes = RingSizes<M, D>;
  using KeysAndValues = KeyValueRing<M, D, Sizes::kSlots, true, false>;
  threadgroup typename KeysAndValues::Memory memory;
  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  QueryGradientRows<M, D> rows(JAX_GLUON_MAKE_OPERANDS, JAX_GLUON_MAKE_COTANGENTS, group, simdgroup,
                               lane);
  const Rows keys = rows.keys, values = rows.values;
  KeysAndValues ring;
  ring.start(&memory, keys, values, rows.block_keys, thread_index);
  for (int i = 0; i < ring.count; ++i) {
    ring.prefetch(keys, values, i, thread_index);
    const bool keys_are_dirty = ring.keys.is_dirty(i, lane);
    ScoreProducts made =
        rows.rows.multiply(p, rows.rules, rows.seen, ring.token(i), ring.keys.rows_of(i, 0),
                           ring.values.rows_of(i, 0), lane);
    for (int t = 0; t < Sizes::kGranuleRows; t += 8) {
      const ScoreProducts at_hand = made;
      if (t + 8 < Sizes::kGranuleRows) {
        made = rows.rows.multiply(p, rows.rules, rows.seen, ring.token(i) + t + 8,
                                  ring.keys.rows_of(i, t + 8), ring.values.rows_of(i, t + 8), lane);
      }
      rows.accumulate(p, at_hand, ring.token(i) + t, ring.keys.rows_of(i, t), keys_are_dirty, lane);
    }
    ring.advance(keys, values, i, thread_index);
  }
  rows.store(p, statistics, query_gradient, lane);
}

JAX_GLUON_INSTANTIATE_ALL(attention_backward_query, float)
JAX_GLUON_INSTANTIATE_ALL(attention_backward_query_gluon, float)
JAX_GLUON_INSTANTIATE_ALL(attention_backward_query, half)
JAX_GLUON_INSTANTIATE_ALL(attention_backward_query_gluon, half)
