// Backward, first pass: dQ = scale * dS K of a block of query rows of one head, and the statistics
// of the rows for the second pass.
#include <metal_stdlib>

using namespace metal;

#include "backward_rows.h"

template <typename M, int D>
kernel void attention_backward_query(JAX_GLUON_OPERANDS, JAX_GLUON_COTANGENTS,
                                     device RowStatistics* statistics [[buffer(kRowStatistics)]],
                                     device uchar* query_gradient [[buffer(kQueryGradient)]],
                                     JAX_GLUON_THREAD) {
  using Sizes = BlockSizes<M, D>;
  JAX_GLUON_KEY_VALUE_TILES(M, D);

  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const Cotangents cotangents = JAX_GLUON_MAKE_COTANGENTS;
  const int n = group.y, b = group.z, k = n / (p.N / p.K);
  const Rows queries = operands.query_rows(b, n);
  const Rows keys = operands.key_rows(b, k), values = operands.value_rows(b, k);
  const HeadRules head_rules(operands, b, n);
  const Visibility visibility = head_rules.visibility;
  const Place place(lane);

  const int block_row = group.x * kBlockRows, first_row = block_row + 8 * simdgroup;
  const int row = first_row + place.row;
  BackwardRows<M, D> rows;
  rows.start(operands, cotangents, b, n, row, lane);
  if (row < p.T && place.column == 0) {
    statistics[(Int64(b) * p.N + n) * p.T + row] = rows.statistics;
  }
  Matrix<float> sum[D / 8];
  for (int d = 0; d < D / 8; ++d) sum[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  float gradient_sum = 0.0f;
  const RowRules rules = head_rules.row(p, row);
  const Range block_keys = visibility.of_rows({block_row, min(block_row + kBlockRows, p.T)});
  const Range seen = visibility.of_rows({first_row, min(first_row + 8, p.T)});

  for (int key0 = tiles.start(keys, values, block_keys, thread_index); key0 < block_keys.end;
       key0 += tiles.kRows) {
    const bool keys_are_dirty =
        tiles.template load<true, false>(keys, values, key0, block_keys.end, thread_index);
    for (int t = 0; t < Sizes::kTileRows; t += 8) {
      const int first = key0 + t, own = first + place.column;
      if (first >= seen.end || first + 8 <= seen.begin) continue;
      const bool2 is_seen = bool2(rules.sees(p, own), rules.sees(p, own + 1));
      if (p.has_mask != 0 && !simd_any(is_seen.x || is_seen.y)) continue;
      float2 products, probability_gradients;
      rows.multiply(p, tiles, t, products, probability_gradients);
      float gradients[2];
      for (int i = 0; i < 2; ++i) {
        if (keys_are_dirty && is_seen[i]) {
          products[i] = product_of_rows(queries, row, keys, own + i, products[i]);
        }
        gradients[i] = score_gradient(p, rules, rows.statistics, own + i, is_seen[i], products[i],
                                      probability_gradients[i])
                           .gradient;
        gradient_sum += gradients[i];
      }
      const Matrix<M> left = matrix_of<M>(gradients[0], gradients[1]);
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.H) continue;
        Matrix<M> right;
        simdgroup_load(right, tiles.keys + t * Sizes::kStride + 8 * d, Sizes::kStride, ulong2(0),
                       false);
        simdgroup_multiply_accumulate(sum[d], left, right, sum[d]);
      }
    }
  }

  gradient_sum = row_sum(gradient_sum);
  if (row >= p.T) return;
  // The mean's part is exactly 0 unless logits were capped or the log-sum-exp has a gradient.
  const bool adds_mean = keys.has_mean() && (p.soft_cap != 0.0f || p.has_log_sum_exp_gradient != 0);
  const Int64 index = ((Int64(b) * p.T + row) * p.N + n) * p.H;
  for (int d = 0; 8 * d < p.H; ++d) {
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * d + place.column + i;
      if (column >= p.H) continue;
      float x = sum[d].thread_elements()[i];
      if (adds_mean) x += gradient_sum * keys.mean_at(column);
      store_float(query_gradient, p.out_type, index + column, x * p.scale);
    }
  }
}

#define JAX_GLUON_INSTANTIATE(type, dim)                                                \
  template [[host_name("attention_backward_query_" #type                                \
                       "_" #dim)]] kernel decltype(attention_backward_query<type, dim>) \
      attention_backward_query<type, dim>;
#define JAX_GLUON_INSTANTIATE_ALL(type) \
  JAX_GLUON_INSTANTIATE(type, 64)       \
  JAX_GLUON_INSTANTIATE(type, 128)      \
  JAX_GLUON_INSTANTIATE(type, 256)

JAX_GLUON_INSTANTIATE_ALL(float)
JAX_GLUON_INSTANTIATE_ALL(half)
